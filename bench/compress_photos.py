"""vqfast's codes against JPEG and WebP at equal bytes, on held-out photographs: docs/results/compression.md.

    vqfast data photos FOLDER
    python bench/compress_photos.py --split FOLDER runs/photos       train and test: links, every 11th held out
    vqfast train --data runs/photos/train --size 96 --batch-size 8 --steps 1000 --lr 1e-3 --set data.resize=360 \\
        --set data.flip=true --set model.hidden=96 --set model.stages=3 --set model.codebook_size=1024 --set model.decay=0.95 \\
        --set model.revive_below=1.0 --set train.schedule=cosine --set train.clip_norm=1.0 --out runs/model
    vqfast train-prior runs/model --channels 64 --layers 6 --set model.head_channels=256 --views 8 --batch-size 16 \\
        --steps 400 --lr 2e-3 --set train.schedule=cosine --out runs/prior
    python bench/compress_photos.py runs/photos/test runs/model runs/prior [MODEL PRIOR ...]
    python bench/compress_photos.py --render docs/results/compression_<date>.json

Bytes are those of the record in a file of `vqfast compress`, coded with the prior's own probabilities, and of the whole
JPEG or WebP file; each codec stands at the one quality at which its mean file comes nearest to ours. Model and prior are
not counted: both ends have them, as both have a codec. The weights of LPIPS are fetched by `vqfast data metrics`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import torch
from report import ROOT, machine

from vqfast.data import PictureFolder
from vqfast.data.pictures import find_pictures
from vqfast.train.config import config_from, read_json
from vqfast.train.evaluate import evaluate
from vqfast.train.priors import find_priors, level_folder
from vqfast.train.runs import last_metrics
from vqfast.train.sources import SOURCES

RESIZE = 360  # shorter side of the photographs, pixels
MEASURES = ("mse", "psnr", "ssim", "lpips")


def split(source: Path, out: Path) -> None:
    """Links to the pictures of a folder: every 11th (from the sixth on, by name) in test, the others in train."""
    for number, path in enumerate(find_pictures(source)):
        link = out / ("test" if number % 11 == 5 else "train") / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def measure(model_path: str, prior_path: str, folder: Path) -> dict:
    model, prior, settings = find_priors(model_path, prior_path)
    config = config_from(read_json(Path(model_path) / "config.json"))
    pictures = PictureFolder(folder, resize=RESIZE)
    items = [pictures[i] for i in range(len(pictures))]
    found = evaluate(model, items, likelihood=False, perceptual=True, prior=prior)
    levels = range(len(settings["shapes"]))
    seconds = [last_metrics(Path(model_path))["seconds"]]
    seconds += [last_metrics(level_folder(Path(prior_path), level))["seconds"] for level in levels]
    return {
        "model": {"kind": config.kind, **dataclasses.asdict(config.model)},
        "trained on": config.data.source if config.data.source in SOURCES else "the other photographs",
        "size": list(items[0].shape[1:]),
        "raw bits per pixel": model.bits_per_pixel(),
        "training steps": [last_metrics(Path(model_path))["step"]]
        + [last_metrics(level_folder(Path(prior_path), level))["step"] for level in levels],
        "training seconds": seconds,
        **dataclasses.asdict(found),
    }


# ---- the page ----

HOW = """\
`python bench/compress_photos.py` on {count} photographs that training never saw ({height} x {width} pixels, Debian's
endless-sky-high-dpi scaled to a shorter side of {height}). {cpu}, torch {torch}, commit {commit}, {date}. Figures in
[{file}]({file}). Minutes of training are by the clock, on one thread.

Means over pictures. Bytes of a codec are its whole file's; ours are the record in a compressed file; model and prior stand
at both ends, as a codec does. Every codec stands at the quality whose mean file comes nearest to ours.
"""


def render(result: dict, name: str, folder: Path) -> None:
    """Writes compression.md."""
    where, first = result["machine"], result["models"][0]
    how = HOW.format(
        count=first["pictures"], height=first["size"][0], width=first["size"][1], cpu=where["cpu"], file=name,
        torch=where["versions"]["torch"], commit=where["commit"], date=result["date"][:10],
    )  # fmt: skip
    parts = ["# Measured: photographs at equal bytes", how, *(section(entry) for entry in result["models"])]
    notes = sorted({note for entry in result["models"] for note in entry["notes"]})
    (folder / "compression.md").write_text("\n\n".join(part.strip() for part in parts + notes) + "\n")


def section(entry: dict) -> str:
    model, bpp = entry["model"], entry["bits_per_pixel"]
    minutes = [f"{seconds / 60:.0f}" for seconds in entry["training seconds"]]
    title = f"## {bpp:.3f} bits per pixel: {model['kind']}, codes of {2 ** model['stages']}x{2 ** model['stages']} pixels"
    trained = (
        f"Trained on {entry['trained on']} for {entry['training steps'][0]:,} steps ({minutes[0]} minutes), its prior for "
        f"{entry['training steps'][1]:,} a level ({' and '.join(minutes[1:])} minutes). Without the prior the codes would take "
        f"{entry['raw bits per pixel']:.3f} bits per pixel."
    )
    rows = ["| | bytes | MSE | PSNR | SSIM | LPIPS |", "|---|---:|---:|---:|---:|---:|"]
    rows += [row("vqfast compress", entry["token_bytes"], entry)]
    for codec in entry["codecs"]:
        remark = ", cannot go lower" if codec["too_large"] else ""
        rows += [row(f"{codec['name']}, quality {codec['quality']}{remark}", codec["bytes"], codec)]
    return "\n\n".join([title, trained, "\n".join(rows), "\n".join(verdict(entry, codec) for codec in entry["codecs"])])


def row(name: str, size: float, found: dict) -> str:
    lpips = "" if found["lpips"] is None else f"{found['lpips']:.3f}"
    return f"| {name} | {size:,.0f} | {found['mse']:.5f} | {found['psnr']:.2f} dB | {found['ssim']:.4f} | {lpips} |"


def verdict(entry: dict, codec: dict) -> str:
    """Which measures are better than the codec's, and which are not."""
    known = [name for name in MEASURES if entry[name] is not None and codec[name] is not None]
    better = {name: (entry[name] > codec[name]) == (name in ("psnr", "ssim")) for name in known}
    wins = [name.upper() for name in known if better[name]]
    losses = [name.upper() for name in known if not better[name]]
    parts = [f"better than {codec['name']} in {', '.join(wins)}"] if wins else []
    parts += [f"worse in {', '.join(losses)}" if wins else f"worse than {codec['name']} in {', '.join(losses)}"] if losses else []
    return f"- {'; '.join(parts)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", help="folder of held-out photographs")
    parser.add_argument("runs", nargs="*", metavar="MODEL PRIOR", help="one pair or more")
    parser.add_argument("--split", type=Path, nargs=2, metavar=("FOLDER", "OUT"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--render", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.render.parent)
    if args.split:
        return split(*args.split)
    if args.pictures is None or not args.runs or len(args.runs) % 2:
        parser.error("name a folder of pictures, then a prior for every model")
    torch.set_num_threads(args.threads)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    pairs = zip(args.runs[::2], args.runs[1::2])
    result = {"date": date, "machine": machine(), "models": [measure(*pair, args.pictures) for pair in pairs]}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"compression_{date[:10]}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    render(result, file.name, args.out)
    print(args.out / "compression.md")


if __name__ == "__main__":
    main()

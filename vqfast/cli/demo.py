"""``vqfast demo`` (``make demo``): two minutes on the embedded photographs, then everything there is to see."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

import vqfast
from vqfast.cli import _guarded
from vqfast.cli._timing import StepTimes, compare_steps
from vqfast.cli.eval import table
from vqfast.data import photographs
from vqfast.models import pad_to_multiple, pixels_to_float
from vqfast.tokens import TokenWriter, model_hash
from vqfast.train.config import assigned
from vqfast.train.evaluate import encode_pictures, evaluate, restore
from vqfast.train.log import read_metrics
from vqfast.train.plots import picture_grid, save_picture
from vqfast.train.report import channels_last
from vqfast.train.runs import begin_run, find_model

# Small enough for two minutes on two cores, large enough that one recognises the pictures.
SETTINGS = {
    "model.hidden": 64,
    "model.residual_hidden": 32,
    "model.residual_layers": 2,
    "model.dim": 32,
    "model.codebook_size": 512,
    "model.decay": 0.95,
    "model.revive_below": 1.0,
    "data.source": "photographs",
    "data.size": 64,
    "data.batch_size": 16,
    "data.flip": True,
    "train.learning_rate": 2e-3,
    "train.schedule": "cosine",
    "train.clip_norm": 1.0,
    "train.init": "kmeans",
}
_TIMED_ROWS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps (default 2000, about two minutes on two cores)"
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where everything goes; a number is added when it is taken"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")


def run(args) -> int:
    folder = free_folder(Path(args.out))
    every = max(1, args.steps // 10)
    values = assigned(
        {
            **SETTINGS,
            "train.steps": args.steps,
            "train.seed": args.seed,
            "train.log_every": every,
            "train.picture_every": 0,
            "train.checkpoint_every": max(1, args.steps // 2),
        }
    )
    print(
        "A VQ-VAE learns to write photographs with 512 codes, each for 4x4 pixels: 0.56 bits per pixel instead of 24.\n"
    )
    if begin_run(values, folder).interrupted:
        return 0
    model, _, _ = find_model(folder)
    tokens = write_tokens(model, folder / "photographs.vqt")
    grid = save_picture(draw(model), folder / "reconstruction.png")
    held_out = photographs("test")
    judged = evaluate(model, (held_out[i] for i in range(len(held_out))))
    print(
        "\nTraining\n" + "\n".join(training_table(read_metrics(folder / "metrics.jsonl"), model.config.data_variance))
    )
    print(f"\nThe {judged.pictures} photographs that it never saw\n" + "\n".join(table(judged)))
    print("\nThe quantizer alone\n" + "\n".join(timing_table(*time_quantizer(model))))
    print(
        "\nLook at\n"
        + "\n".join(
            f"  {path!s:<36} {what}"
            for path, what in (
                (grid, "originals over reconstructions; the first two were not trained on"),
                (folder / "plots" / "training.png", "loss, perplexity, usage (also as .svg)"),
                (tokens, "all 16 photographs as tokens"),
                (folder / "model", "the model, for vqfast.models.load_pretrained"),
            )
        )
    )
    print(
        f"Try\n  vqfast decode {folder} {tokens} {folder / 'decoded'}\n"
        f"  vqfast train --resume {folder} --steps {2 * args.steps}"
    )
    return 0


def free_folder(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist yet."""
    place, number = folder, 1
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    return place


def write_tokens(model, path: Path) -> Path:
    """All embedded photographs as one token file."""
    pictures = photographs("all")
    with TokenWriter(path, model=model_hash(model.state_dict()), codebook_sizes=[model.config.codebook_size]) as writer:
        for name, picture in pictures.iterate():
            codes, _ = encode_pictures(model, picture[None])
            writer.write(name.name, picture.shape[2], picture.shape[1], [level[0].numpy() for level in codes])
    return path


def draw(model):
    """Two photographs of the training set and the two that were held out, each over its reconstruction."""
    seen, held_out = photographs("train"), photographs("test")
    pixels = torch.stack([held_out[0], held_out[1], seen[len(seen) // 3], seen[2 * len(seen) // 3]])
    restored, _, _ = restore(model, pixels)
    return picture_grid(
        [("original", channels_last(pixels)), ("reconstruction from tokens", channels_last(restored))], columns=2
    )


def training_table(lines: list[dict], variance: float) -> list[str]:
    """The log as a table. The squared error is the reconstruction loss times the variance that the model divides by."""
    rows = ["   step     loss   PSNR dB   perplexity   usage   pictures/s"]
    for line in lines:
        psnr = -10 * math.log10(line["reconstruction_loss"] * variance)
        rows += [
            f"{line['step']:>7} {line['loss']:>8.4f} {psnr:>9.2f} {line['perplexity']:>12.1f} {line['usage']:>7.0%} "
            f"{line['pictures_per_second']:>12.0f}"
        ]
    return rows


@torch.no_grad()
def time_quantizer(model) -> tuple[StepTimes, torch.Tensor, torch.Tensor]:
    """A training step of the layer against the plain one, on this model's own latents."""
    x, _ = pad_to_multiple(pixels_to_float(photographs("train")[0][None]), model.stride)
    rows = model._latents(x).permute(0, 2, 3, 1).reshape(-1, model.config.dim)
    rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _TIMED_ROWS)).long()].contiguous()
    codebook = model.quantizers[0].codebook.detach().clone()
    with torch.enable_grad():
        return compare_steps(rows, codebook), rows, codebook


def timing_table(times: StepTimes, rows: torch.Tensor, codebook: torch.Tensor) -> list[str]:
    """What the comparison measured, and under which conditions."""
    backend = vqfast.explain("nearest", rows, codebook).splitlines()[0]
    return [
        f"  training step of {len(rows)} rows of {rows.shape[1]}, {len(codebook)} codes, "
        f"{torch.get_num_threads()} threads; {backend}",
        f"  vqfast         {times.ours:8.2f} ms   every code is the nearest one (checked in float64 just now)",
        f"  plain PyTorch  {times.plain:8.2f} ms   {times.agreement:.2%} of its codes are; cdist, argmin, one-hot",
        f"  ratio          {times.ratio:8.2f}      medians of 15 in turns, after warm-up",
    ]


def main() -> int:
    """``python -m vqfast.cli.demo``."""
    parser = argparse.ArgumentParser(prog="vqfast demo", description=__doc__)
    add_arguments(parser)
    return _guarded(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

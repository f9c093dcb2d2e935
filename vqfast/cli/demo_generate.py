"""``vqfast demo-generate`` (``make demo-generate``): a small VQ-VAE-2, priors over its codes, and pictures drawn from
them, in a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vqfast.cli import _guarded
from vqfast.cli.demo import free_folder
from vqfast.data import default_folder
from vqfast.data.fetch import complete_folder
from vqfast.models import VQVAE2, HierarchicalPrior, float_to_pixels
from vqfast.train.config import assigned
from vqfast.train.evaluate import restore
from vqfast.train.plots import picture_grid, save_picture
from vqfast.train.priors import begin_priors, find_priors, level_folder
from vqfast.train.report import channels_last, sample_pictures
from vqfast.train.runs import begin_run, find_model
from vqfast.train.sources import open_sources

AUTOENCODER = {
    "model.kind": "vqvae2",
    "model.hidden": 64,
    "model.residual_hidden": 32,
    "model.dims": [32, 32],
    "model.codebook_sizes": [256, 256],
    "model.decay": 0.95,
    "model.revive_below": 1.0,
    "data.batch_size": 32,
    "data.flip": True,
    "train.learning_rate": 2e-3,
    "train.schedule": "cosine",
    "train.clip_norm": 1.0,
    "train.picture_every": 0,
    "train.checkpoint_every": 200,
}
PRIOR = {
    "model.kind": "gated",
    "model.channels": 64,
    "model.layers": 6,
    "model.head_channels": 128,
    "model.condition_layers": 1,
    "data.batch_size": 32,
    "train.learning_rate": 2e-3,
    "train.schedule": "cosine",
    "train.clip_norm": 1.0,
    "train.picture_every": 0,
    "train.checkpoint_every": 200,
}
# Crops of the embedded photographs, which have no labels; CIFAR-10 when it is on this machine.
PHOTOGRAPHS = {"data.source": "photographs", "data.size": 32, "codes.views": 200}
CIFAR10 = {"data.source": "cifar10", "data.size": 32, "codes.views": 1, "codes.limit": 25_000, "codes.labels": True}
_PER_CLASS, _UNLABELLED = 8, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", choices=("cifar10", "photographs"), help="default: cifar10 when it is on this machine, else photographs"
    )
    parser.add_argument("--steps", type=int, default=800, help="training steps of the autoencoder and of each prior")
    parser.add_argument(
        "--out", default="runs/demo-generate", metavar="FOLDER", help="a number is added when it is taken"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")


def run(args) -> int:
    folder = free_folder(Path(args.out))
    source = args.data or ("cifar10" if complete_folder("cifar10", default_folder("cifar10")) else "photographs")
    data = CIFAR10 if source == "cifar10" else PHOTOGRAPHS
    length = {"train.steps": args.steps, "train.seed": args.seed, "train.log_every": max(1, args.steps // 5)}
    print(f"A VQ-VAE-2 learns to write 32x32 pictures ({source}) as 8x8 and 4x4 codes.\n")
    own = {key: value for key, value in data.items() if key.startswith("data.")}
    if begin_run(assigned(AUTOENCODER | own | length), folder / "model").interrupted:
        return 0
    print("\nA prior for each level learns which codes go together, the coarse level first.\n")
    values = PRIOR | data | length | {"codes.model": str(folder / "model")}
    if begin_priors(assigned(values), folder / "prior").interrupted:
        return 0
    model, prior, settings = find_priors(folder / "model", folder / "prior")
    drawn, labels, seconds = draw(model, prior, settings, args.seed)
    sheet = save_picture(sample_sheet(drawn, labels, settings["classes"]), folder / "samples.png")
    trained_on = find_model(folder / "model")[1].data
    pictures = sample_pictures(open_sources(trained_on, 3).train, 10)
    restored, _, _ = restore(model, pictures)
    rows = [("original", channels_last(pictures)), ("reconstruction", channels_last(restored))]
    grid = save_picture(picture_grid(rows, columns=10), folder / "reconstruction.png")
    print("\n".join(bits_table(folder / "prior", settings["shapes"])))
    codes = sum(rows * columns for rows, columns in settings["shapes"])
    print(f"\n{len(drawn)} pictures of {codes} codes drawn in {seconds:.1f} s, {torch.get_num_threads()} threads")
    print(f"\nLook at\n  {sheet!s:<44} drawn from the priors\n  {grid!s:<44} what the autoencoder keeps of a picture")
    print(f"Try\n  vqfast sample {folder / 'model'} {folder / 'prior'} more.png --seed 1 --temperature 0.9")
    return 0


@torch.no_grad()
def draw(model: VQVAE2, prior: HierarchicalPrior, settings: dict, seed: int) -> tuple[Tensor, Tensor | None, float]:
    """(uint8 pictures, their labels or None, seconds that the codes took)."""
    classes = len(settings["classes"])
    labels = torch.arange(classes).repeat_interleave(_PER_CLASS) if classes else None
    count = len(labels) if classes else _UNLABELLED
    begin = time.perf_counter()
    levels = prior.sample(count, *settings["shapes"][-1], labels=labels, seed=seed)
    seconds = time.perf_counter() - begin
    return float_to_pixels(model.decode(levels)), labels, seconds


def sample_sheet(pictures: Tensor, labels: Tensor | None, classes: list[str]):
    """A row per class, or plain rows; a Pillow image."""
    shown = channels_last(pictures)
    if labels is None:
        return picture_grid([("drawn", shown)], columns=_PER_CLASS)
    rows = [(name, shown[(labels == i).numpy()]) for i, name in enumerate(classes)]
    return picture_grid(rows, columns=len(shown) // len(classes), least=64)


def bits_table(folder: Path, shapes: list[list[int]]) -> list[str]:
    lines = ["bits per held-out code      prior    single codes    uniform"]
    for level in reversed(range(len(shapes))):
        judged = json.loads((level_folder(folder, level) / "held_out.json").read_text())
        name = "x".join(map(str, shapes[level]))
        lines += [
            f"  level {level} ({name})".ljust(24)
            + f"{judged['bits_per_code']:>9.3f} {judged['unigram']:>15.3f} {judged['uniform']:>10.3f}"
        ]
    return lines


def main() -> int:
    """``python -m vqfast.cli.demo_generate``."""
    parser = argparse.ArgumentParser(prog="vqfast demo-generate", description=__doc__)
    add_arguments(parser)
    return _guarded(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

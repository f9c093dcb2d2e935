"""``vqfast sample``: pictures drawn from a model and its prior."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from vqfast._files import check_output_file, check_output_folder
from vqfast.cli import UserError
from vqfast.data import save_picture
from vqfast.models import HierarchicalPrior, float_to_pixels
from vqfast.train.priors import find_priors

EPILOG = """\
OUT.png gets a sheet of all pictures; a folder gets one PNG each. The same seed gives the same codes on every CPU,
whatever the batch."""


def add_arguments(parser) -> None:
    parser.add_argument("model", help="the model that decodes")
    parser.add_argument("prior", help="folder that vqfast train-prior wrote")
    parser.add_argument("out", help="a .png for a sheet, or a folder")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument(
        "--classes", default="", metavar="A,B,..", help="classes by name or number, in turn (default: all)"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args) -> int:
    if args.count < 1 or args.batch_size < 1:
        raise UserError(f"--count is {args.count}, --batch-size {args.batch_size}; both must be at least 1")
    if not 0 <= args.seed < 2**62:  # levels add to it
        raise UserError(f"--seed is {args.seed}, but must lie in 0..2**62 - 1")
    (check_output_file if is_sheet(args.out) else check_output_folder)(args.out)
    model, prior, settings = find_priors(args.model, args.prior)
    labels = labels_for(args, settings["classes"])
    options = dict(
        labels=labels, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, batch_size=args.batch_size,
        progress=not args.quiet,
    )  # fmt: skip
    try:
        drawn = prior.sample(args.count, *settings["shapes"][-1], **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    levels = drawn if isinstance(prior, HierarchicalPrior) else [drawn]
    write(Path(args.out), pictures(model, levels, args.batch_size), args.seed)
    print(f"{args.count} pictures in {args.out}")
    return 0


def labels_for(args, classes: list[str]) -> Tensor | None:
    if not classes:
        if args.classes:
            class_number(args.classes, classes)
        return None
    wanted = (
        [class_number(name.strip(), classes) for name in args.classes.split(",")]
        if args.classes
        else range(len(classes))
    )
    wanted = list(wanted)
    return torch.tensor([wanted[i % len(wanted)] for i in range(args.count)])


def class_number(name: str, classes: list[str]) -> int:
    """A class by name or number."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and len(name) < 10 and int(name) < len(classes):
        return int(name)
    raise UserError(
        f"there is no class {name!r}; there are {', '.join(classes) or 'none: this prior was trained without labels'}"
    )


@torch.no_grad()
def pictures(model: torch.nn.Module, levels: list[Tensor], batch: int) -> Tensor:
    parts = [level.split(batch) for level in levels]
    return torch.cat([float_to_pixels(model.decode(list(group))) for group in zip(*parts)])


def is_sheet(out: str | Path) -> bool:
    return Path(out).suffix.lower() == ".png"


def write(out: Path, found: Tensor, seed: int) -> None:
    if is_sheet(out):
        save_picture(out, sheet(found))
        return
    for i, picture in enumerate(found):
        save_picture(out / f"seed{seed}-{i:05d}.png", picture)


def sheet(found: Tensor, gap: int = 2) -> Tensor:
    """uint8 [N, C, H, W] -> one picture [C, rows, columns], nearly square, white gaps."""
    count, channels, height, width = found.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    page = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(found):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = picture
    return page

"""Makes the files of bench/data: what a trained encoder gives its quantizer, and codebooks that fit it.

    vqfast data cifar10
    python bench/make_latents.py                 the large codebooks, from the model of bench/data: half a minute
    python bench/make_latents.py --all           also the files of bench/data, which are in the repository
    python bench/make_latents.py RUN --out DIR   everything, from a model of your own, for sweep.py --latents DIR

RUN is a run's folder, a checkpoint, or a folder from save_pretrained, of a model whose first quantizer has 64 channels.
The codebooks with 65,536 and 1,048,576 codes are too large for the repository; they go to the user's cache folder (see `latents.py`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from latents import CODES, FOLDER, HUGE, LARGE, LEVELS, RESIDUAL, ROWS, codes_file, rows_file
from safetensors.torch import save_file

import vqfast
from vqfast.data import CIFAR10, default_folder
from vqfast.models import pixels_to_float
from vqfast.tokens import model_hash
from vqfast.train.runs import find_model

ITERATIONS = 10  # of k-means; more changes the mean squared distance by less than 1 %
FILE_ROWS = 8192  # 1.0 MiB of float16


@torch.no_grad()
def encoder_rows(model: torch.nn.Module, pixels: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` vectors [rows, D] that the model's first quantizer is given for these pictures."""
    got: list[torch.Tensor] = []
    # The model's own path up to the quantizer, whatever lies before it; channels stand second there.
    hook = model.quantizers[0].register_forward_pre_hook(
        lambda layer, args: got.append(args[0].movedim(1, -1).flatten(0, -2))
    )
    for batch in pixels.split(128):
        model(pixels_to_float(batch))
        if sum(map(len, got)) >= rows:
            break
    hook.remove()
    found = torch.cat(got)[:rows].contiguous()
    if len(found) < rows:
        raise SystemExit(f"these pictures give {len(found)} rows, but {rows} are needed")
    return found


def shuffled(rows: torch.Tensor) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def save(path: Path, values: torch.Tensor, about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"values": values.half().contiguous()}, path, metadata=about)
    print(f"{path}: {list(values.shape)} float16, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=FOLDER / "model", help="default: the model of bench/data")
    parser.add_argument("--pictures", type=Path, default=default_folder("cifar10"), help="CIFAR-10's binary files")
    parser.add_argument("--all", action="store_true", help="write the files of bench/data too")
    parser.add_argument("--out", type=Path, help="folder for all files; default: the cache folder, for the large ones")
    args = parser.parse_args()
    if args.run.resolve() != FOLDER.resolve() / "model" and not args.out:
        parser.error("name a folder with --out: the cache folder is for the model of bench/data")
    folder, cache = args.out or FOLDER, args.out or HUGE.parent
    model, _, source = find_model(args.run)
    model.float()  # the one in the repository is kept in float16
    about = {"model": f"preset cifar10, {Path(source).name}", "weights": model_hash(model.state_dict())}

    # All rows of a picture resemble each other, so codes come from a random draw over many pictures.
    training = encoder_rows(model, CIFAR10(args.pictures, train=True).pixels, 16 * 65_536)
    save(cache / HUGE.name, shuffled(training), about | {"what": "encoder outputs of training pictures, in random order"})
    many = shuffled(training[: 4 * 65_536])
    save(cache / LARGE.name, many[:65_536], about | {"what": "encoder outputs of training pictures, as codes"})
    if args.all or args.out:
        held_out = encoder_rows(model, CIFAR10(args.pictures, train=False).pixels, ROWS)
        save_small(folder, held_out, many, about)


def save_small(folder: Path, held_out: torch.Tensor, many: torch.Tensor, about: dict[str, str]) -> None:
    """Held-out rows, and codebooks by k-means of `many` training rows."""
    for part, values in enumerate(held_out.split(FILE_ROWS)):
        save(folder / rows_file(part), values, about | {"what": f"encoder outputs of held-out pictures, part {part}"})
    for size in CODES:
        found = vqfast.kmeans(many[:131_072], size, iterations=ITERATIONS)
        what = (
            f"k-means of training pictures' encoder outputs, root mean square distance {math.sqrt(found.inertia):.4f}"
        )
        save(folder / codes_file(size), found.codebook, about | {"what": what})

    levels, rest = [], many[:65_536]
    for _ in range(LEVELS):
        found = vqfast.kmeans(rest, 1024, iterations=ITERATIONS)
        levels.append(found.codebook)
        rest = rest - found.codebook[found.indices]
    what = "residual k-means of training pictures' encoder outputs, one level after the other"
    save(folder / RESIDUAL, torch.stack(levels), about | {"what": what})

    spectrum = torch.linalg.eigvalsh(torch.cov(held_out.double().T)).flip(0)
    shares = ", ".join(f"{100 * spectrum[:p].sum() / spectrum.sum():.1f} % in {p}" for p in (4, 8, 16))
    print(f"variance of the held-out rows in the first principal directions: {shares}")


if __name__ == "__main__":
    main()

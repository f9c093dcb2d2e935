"""The stored encoder outputs and codebooks of bench/data, as float32. `make_latents.py` makes them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from vqfast.data import default_folder

FOLDER = Path(__file__).parent / "data"
# Made on demand, not in the repository: training rows in random order, 8.4 and 134 MB.
LARGE = default_folder("latents") / "cifar10_train_65536.safetensors"
HUGE = default_folder("latents") / "cifar10_train_1048576.safetensors"
ROWS = 16_384
CODES = (512, 1024, 8192)
LEVELS, RESIDUAL = 8, "cifar10_residual_8x1024.safetensors"


def rows_file(part: int) -> str:
    return f"cifar10_test_rows_{part}.safetensors"


def codes_file(size: int) -> str:
    return f"cifar10_codes_{size}.safetensors"


def load_rows(rows: int, folder: Path = FOLDER) -> torch.Tensor:
    """Encoder outputs of held-out pictures [rows, 64]; from `folder`, where make_latents.py wrote those of another model."""
    if rows > ROWS:
        raise ValueError(f"bench/data holds {ROWS} rows, but {rows} were asked for")
    return torch.cat([load_file(folder / rows_file(part))["values"] for part in range(2)])[:rows].float()


def has_codes(size: int) -> bool:
    return size in CODES or (size == 65_536 and LARGE.exists())


def load_codes(size: int) -> torch.Tensor:
    """A codebook [size, 64] made from training pictures."""
    if not has_codes(size):
        hint = "python bench/make_latents.py makes that one" if size == 65_536 else f"there are {CODES} and 65536"
        raise ValueError(f"there is no codebook with {size} codes on this machine: {hint}")
    return load_file(LARGE if size == 65_536 else FOLDER / codes_file(size))["values"].float()


def load_residual_codes() -> torch.Tensor:
    """Residual codebooks [8, 1024, 64] made from training pictures."""
    return load_file(FOLDER / RESIDUAL)["values"].float()

"""The named shapes of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from latents import has_codes, load_codes, load_rows

from vqfast.cli.bench import isotropic

LATENTS, ISOTROPIC = "latents", "isotropic"


@dataclass(frozen=True)
class Shape:
    """N rows, K codes, 64 numbers each, from `data`: a trained encoder's outputs, or independent normal numbers."""

    data: str
    rows: int
    codes: int
    dim: int = 64

    @property
    def name(self) -> str:
        return f"{self.data}-N{self.rows}-K{self.codes}"

    def available(self) -> bool:
        return self.data == ISOTROPIC or has_codes(self.codes)

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [N, D] and codebook [K, D], float32."""
        if self.data == ISOTROPIC:
            return isotropic(self.rows, self.dim, self.codes)
        return load_rows(self.rows), load_codes(self.codes)


def both(rows: int, codes: int) -> list[Shape]:
    return [Shape(data, rows, codes) for data in (LATENTS, ISOTROPIC)]


# One step of a small picture model, and one of a large batch.
STEPS = [*both(2048, 1024), *both(16_384, 1024), *both(16_384, 8192)]
# Every method within seconds; K = 65,536, where N x K scores fill 4 GiB, is in report.py.
SEARCHES = [*both(2048, 512), *both(16_384, 512), *both(16_384, 1024), *both(16_384, 8192)]

"""Data built to hit the contract: every builder returns (x [N, D], codebook [K, D]) from a seeded generator.

The border's own tiles are 12 rows x 32 codes on CPU and powers of two on GPU; sizes here straddle all of them.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch

TILE = 32  # codes in a panel
CODEBOOK_SIZES = (1, 2, 31, 32, 33, 100, 1023, 1024)
DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 512, 1000)
ROW_COUNTS = (1, 11, 12, 13, 24, 25, 97)
LOW = (torch.float16, torch.bfloat16)


class Data(NamedTuple):
    x: torch.Tensor
    codebook: torch.Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, low: int = -4, high: int = 4, dtype=torch.float32) -> torch.Tensor:
    """Integer-valued floats: sums and products are exact in every dtype and order, so equality is exact."""
    return torch.randint(low, high + 1, shape, generator=generator(seed)).to(dtype)


def clustered(n: int, k: int, dim: int, seed: int = 0, spread: float = 0.3) -> Data:
    """Rows scattered around codes, as in a trained quantizer."""
    codebook = normal(k, dim, seed=seed)
    owner = torch.randint(0, k, (n,), generator=generator(seed + 1))
    return Data(codebook[owner] + spread * normal(n, dim, seed=seed + 2), codebook)


def gaussian() -> Data:
    return Data(normal(101, 16, seed=1), normal(100, 16, seed=2))


def trained() -> Data:
    return clustered(200, 130, 24, seed=3)


def lattice() -> Data:
    """Integers in few dimensions: most rows have several codes at exactly the same distance."""
    return Data(integers(150, 3, seed=4), integers(300, 3, seed=5))


def lattice_wide() -> Data:
    return Data(integers(60, 40, seed=6), integers(100, 40, seed=7))


def duplicates_across_tiles() -> Data:
    """Each code appears at several places, just before, on and after tile borders: the lowest must win."""
    codebook = normal(6 * TILE + 5, 9, seed=8)
    for low, high in ((31, 32), (30, 63), (0, 64), (33, 96), (12, 127), (95, 160), (5, 196), (64, 65)):
        codebook[high] = codebook[low]
    return Data(torch.cat([codebook, codebook + 1e-3 * normal(*codebook.shape, seed=9)]), codebook)


def all_codes_identical() -> Data:
    return Data(normal(50, 12, seed=10), normal(1, 12, seed=11).expand(3 * TILE + 1, 12).clone())


def mostly_identical_codes() -> Data:
    """90 % of the codes are one and the same; the others sit around it."""
    codebook = normal(1, 8, seed=12).repeat(320, 1)
    codebook[::10] += 0.1 * normal(32, 8, seed=13)
    return Data(codebook[torch.arange(0, 320, 3)] + 0.05 * normal(107, 8, seed=14), codebook)


def ulp_neighbours() -> Data:
    """Codes that differ from each other by one ulp in one component; rows on, beside and between them."""
    base = normal(1, 11, seed=15)
    codebook = base.repeat(2 * TILE + 3, 1)
    for k in range(1, len(codebook)):
        d = (k * 7) % 11
        toward = torch.tensor(math.inf if k % 2 else -math.inf)
        for _ in range(1 + k // 22):
            codebook[k, d] = torch.nextafter(codebook[k, d], toward)
    away = base + 10 * normal(40, 11, seed=16)
    return Data(torch.cat([codebook, (codebook + codebook.roll(1, 0)) / 2, away]), codebook)


def permuted_offsets() -> Data:
    """Real ties that rounding breaks: codes hold one set of components in many orders, rows are zero or constant.

    Exact arithmetic gives equal distances. The float64 sum in ascending d does not, and the contract says that it
    decides; any other order of summation, or a fused multiply-add, answers otherwise for some of these rows.
    """
    g = generator(17)
    parts = torch.randn(23, generator=g) * torch.exp2(torch.randint(-9, 9, (23,), generator=g).float())
    codebook = torch.stack([parts[torch.randperm(23, generator=g)] for _ in range(150)])
    return Data(torch.cat([torch.zeros(1, 23), torch.exp2(torch.arange(-8.0, 9.0))[:, None].expand(-1, 23)]), codebook)


def offset() -> Data:
    """Everything sits around 1000: the expanded |x|^2 - 2xc + |c|^2 in float32 picks wrong codes on most rows."""
    x, codebook = clustered(200, 256, 16, seed=18, spread=1.0)
    return Data(x + 1000.0, codebook + 1000.0)


def offset_mixed_signs() -> Data:
    x, codebook = clustered(100, 100, 17, seed=19, spread=1.0)
    shift = 1000.0 * torch.sign(normal(17, seed=20))
    return Data(x + shift, codebook + shift)


def huge_norms() -> Data:
    """Around 1e30: squares overflow float32, so distances are inf there, but the order is well defined."""
    x, codebook = clustered(60, 70, 10, seed=21)
    return Data(x * 1e30, codebook * 1e30)


def huge_code_among_normal() -> Data:
    x, codebook = clustered(80, 100, 16, seed=22)
    codebook[7], codebook[64], codebook[99] = 1e30, -1e30, 3e38
    return Data(x, codebook)


def huge_rows_among_normal() -> Data:
    x, codebook = clustered(80, 100, 16, seed=23)
    x[3], x[12], x[70, 5] = 1e30, -3e38, 1e25
    return Data(x, codebook)


def tiny_norms() -> Data:
    """Around 1e-30: squares underflow float32."""
    x, codebook = clustered(60, 70, 10, seed=24)
    return Data(x * 1e-30, codebook * 1e-30)


def denormals() -> Data:
    """Multiples of the smallest subnormal; a kernel that flushes them sees all zeros."""
    x, codebook = clustered(60, 70, 10, seed=25)
    return Data((x * 300).round() * 2.0**-149, (codebook * 300).round() * 2.0**-149)


def denormals_and_ones() -> Data:
    x, codebook = denormals()
    x[::3, 0] += 1.0
    codebook[::2, 0] += 1.0
    return Data(x, codebook)


def wide_range() -> Data:
    """Components from 1e-18 to 1e18 within a row."""
    scale = torch.logspace(-18, 18, 13)
    x, codebook = clustered(80, 90, 13, seed=26)
    return Data(x * scale, codebook * scale)


def zero_codes() -> Data:
    return Data(normal(40, 20, seed=27), torch.zeros(70, 20))


def zero_rows() -> Data:
    return Data(torch.zeros(15, 20), normal(70, 20, seed=28))


def zeros_among_normal() -> Data:
    x, codebook = clustered(60, 70, 20, seed=29)
    x[::7], codebook[::5] = 0.0, 0.0
    return Data(x, codebook)


def zeros_only() -> Data:
    return Data(torch.zeros(14, 5), torch.zeros(33, 5))


def on_a_line() -> Data:
    """One-dimensional data in 32 dimensions, with both ends of many intervals equally far."""
    direction = integers(1, 32, seed=30)
    steps = torch.arange(-60.0, 61.0)[:, None]
    return Data(steps * direction, (2 * torch.arange(-40.0, 41.0))[torch.randperm(81, generator=generator(31))][:, None] * direction)


def rank_deficient() -> Data:
    """Rank 3 in 40 dimensions."""
    plane = normal(3, 40, seed=32)
    x, codebook = clustered(120, 150, 3, seed=33)
    return Data(x @ plane, codebook @ plane)


def rows_identical() -> Data:
    x, codebook = clustered(1, 200, 16, seed=34)
    return Data(x.repeat(100, 1), codebook)


def scaled_codes() -> Data:
    """Codes that are multiples of each other: exact cosine ties for powers of two, near-ties for the others."""
    base = normal(20, 9, seed=35)
    factors = torch.tensor([1.0, 2.0, 0.25, 3.0, 1e-3, 7.0])
    return Data(normal(60, 9, seed=36), (factors[:, None, None] * base).reshape(-1, 9))


def nonfinite_rows() -> Data:
    x, codebook = clustered(60, 70, 9, seed=37)
    x[0], x[5, 3], x[12, 8], x[13], x[40, 0] = math.nan, math.nan, math.inf, -math.inf, -math.inf
    x[41, 0], x[41, 1] = math.inf, -math.inf
    return Data(x, codebook)


def nonfinite_codes() -> Data:
    x, codebook = clustered(60, 100, 9, seed=38)
    codebook[0], codebook[31, 2], codebook[32], codebook[64, 8], codebook[99, 0] = math.nan, math.inf, -math.inf, math.nan, -math.inf
    return Data(x, codebook)


def nonfinite_rows_and_codes() -> Data:
    return Data(nonfinite_rows().x, nonfinite_codes().codebook)


def all_codes_nonfinite() -> Data:
    x, codebook = clustered(30, 40, 9, seed=39)
    codebook[:, 4] = math.nan
    codebook[::2, 4] = math.inf
    return Data(x, codebook)


NEAREST: tuple[Callable[[], Data], ...] = (
    gaussian, trained, lattice, lattice_wide, duplicates_across_tiles, all_codes_identical, mostly_identical_codes,
    ulp_neighbours, permuted_offsets, offset, offset_mixed_signs, huge_norms, huge_code_among_normal,
    huge_rows_among_normal, tiny_norms, denormals, denormals_and_ones, wide_range, zero_codes, zero_rows,
    zeros_among_normal, zeros_only, on_a_line, rank_deficient, rows_identical, scaled_codes, nonfinite_rows,
    nonfinite_codes, nonfinite_rows_and_codes, all_codes_nonfinite,
)  # fmt: skip


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values [B, N, D] behind other strides and offsets; x has B = 2 and N = 24 = 4 * 6."""
    b, n, d = x.shape
    image = torch.empty(b, d, 4, n // 4).copy_(x.transpose(1, 2).reshape(b, d, 4, n // 4)).to(x.dtype)
    padded = torch.full((b, n, d + 3), math.nan, dtype=x.dtype)
    padded[..., 1 : d + 1] = x
    sparse_rows = torch.full((b, 3 * n, 2 * d), math.nan, dtype=x.dtype)
    sparse_rows[:, 1::3, 1::2] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)
    shifted[1:] = x.reshape(-1)
    batch_inside = torch.empty(n, d, b, dtype=x.dtype).copy_(x.permute(1, 2, 0))
    return {
        "contiguous": x.contiguous(),
        "channels_first": image.flatten(2).transpose(1, 2),
        "channels_last_memory": image.to(memory_format=torch.channels_last).flatten(2).transpose(1, 2),
        "inside_wider_rows": padded[..., 1 : d + 1],
        "every_third_row_every_second_column": sparse_rows[:, 1::3, 1::2],
        "one_element_off_alignment": shifted[1:].view(b, n, d),
        "batch_innermost": batch_inside.permute(2, 0, 1),
        "rows_reversed_twice": x.flip(1).flip(1),
    }

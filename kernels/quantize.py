"""quantize on Triton: the search, then one pass over x that writes everything else of the step.

    nearest -> distance, indices -> step: quantized row, index with mask, squared error, non-finite rows -> ema: counts, sums
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._cast import _as
from ._rows import _row_pointers, row_alignment
from ._triton import cdiv, on_device
from .ema import code_counts, code_sums
from .nearest import nearest_triton


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "rows"], do_not_specialize_on_alignment=["stride_d"])
def _step_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, rows, groups,
    codebook, code_stride_g, code_stride_k, code_stride_d,
    distance, found, mask,
    quantized, rest, total, indices, counted, error, nonfinite,
    MASKED: tl.constexpr, LEVEL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the B * G * N rows: reads x and its code once, writes the step's outputs and one partial sum of each kind.

    LEVEL -1: a single quantizer, writes `quantized`. LEVEL 0, 1: the first and every other level of a residual one, writes x - code to `rest`, code
    to or onto `total`.
    """
    p = tl.program_id(0).to(tl.int64)
    r = p * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = r < rows
    n = r % N
    b = r // N // groups
    g = r // N % groups
    unmasked = inside
    if MASKED:
        unmasked = inside & (tl.load(mask + b * N + n, mask=inside, other=0) != 0)
    away = tl.load(distance + r, mask=inside, other=0.0)
    finite = away == away
    index = tl.load(found + r, mask=inside, other=0)
    valid = unmasked & finite
    tl.store(indices + r, tl.where(unmasked, index, -1), mask=inside)
    tl.store(counted + r, tl.where(valid, index, -1), mask=inside)
    tl.store(nonfinite + p, tl.sum((unmasked & ~finite).to(tl.int64), 0))
    row = _row_pointers(x, stride_b, stride_g, stride_n, b, g, n, ALIGN)
    code = codebook + g * code_stride_g + index * code_stride_k
    # What stands in the place of a code where a row has none: NaN where it is not finite, 0 where it is masked.
    instead = tl.where(unmasked, float("nan"), 0.0)
    squares = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        some = inside[:, None] & (ds < D)[None, :]
        value = tl.load(row[:, None] + ds[None, :] * stride_d, mask=some, other=0.0).to(tl.float32)
        chosen = tl.load(code[:, None] + ds[None, :] * code_stride_d, mask=some, other=0.0).to(tl.float32)
        difference = value.to(tl.float64) - chosen.to(tl.float64)
        squares += tl.sum(difference * difference, 1)
        chosen = tl.where(valid[:, None], chosen, instead[:, None])
        at = r[:, None] * D + ds[None, :]
        if LEVEL < 0:
            tl.store(quantized + at, _as(chosen, quantized.dtype.element_ty), mask=some)
        else:
            tl.store(rest + at, value - chosen, mask=some)
            if LEVEL > 0:
                chosen = tl.load(total + at, mask=some, other=0.0) + chosen
            tl.store(total + at, chosen, mask=some)
    # Rows that do not count are left out of the sum here, once; inside the loop the choice costs two registers an element.
    tl.store(error + p, tl.sum(tl.where(valid, squares, 0.0), 0))


def _step(x, codebook, mask, metric, with_sums, *, quantized=None, rest=None, total=None, level=-1):
    """One quantizer on rows x; -> (sq_error [2], indices, sums, counts, nonfinite). The outputs given are written in place."""
    b, g, n, d = x.shape
    k, rows = codebook.shape[1], b * g * n
    tile = _tuning.step(d)
    programs = cdiv(rows, tile["BLOCK_N"])
    distance, found = nearest_triton(x, codebook, metric)
    empty = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    indices, counted = empty(torch.int64, b, g, n), empty(torch.int64, b, g, n)
    error, nonfinite = empty(torch.float64, programs), empty(torch.int64, programs)
    if rows:
        mask_bytes = found if mask is None else mask.contiguous().view(torch.uint8)
        unused = error  # a pointer for each output that this kind of step does not write
        with on_device(x):
            _step_kernel[(programs,)](
                x, *x.stride(), n, d, rows, g, codebook, *codebook.stride(), distance, found, mask_bytes,
                unused if quantized is None else quantized, unused if rest is None else rest, unused if total is None else total,
                indices, counted, error, nonfinite, MASKED=mask is not None, LEVEL=min(level, 1),
                ALIGN=row_alignment(x), **tile,
            )  # fmt: skip
    if with_sums:
        sums, counts = code_sums(x, counted, k, check=False)
    else:
        sums, counts = empty(torch.float32, 0), code_counts(counted, k)
    # One partial sum per program, added in a fixed order.
    return error.sum().expand(2).contiguous(), indices, sums, counts, nonfinite.sum()


def quantize_triton(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: int, with_sums: bool, order: Tensor | None = None,
    basis: Tensor | None = None, guess: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [B, G, N, D], codebook [G, K, D], mask [B, N] -> quantized, sq_error [2], indices, sums, counts, nonfinite; no host sync."""
    quantized = torch.empty_like(x)  # in the layout of x; the kernel writes rows
    rows = quantized if quantized.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    results = _step(x, codebook, mask, metric, with_sums, quantized=rows)
    return quantized if rows is quantized else quantized.copy_(rows), *results

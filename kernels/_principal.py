"""The principal-direction screen: rows and codes in 63 directions and the length of what is left, a lower bound on every score.

For orthonormal directions P (63 rows) and what they leave, x - P'P x, of length rho_x, Cauchy-Schwarz gives

    x'.c' = Px'.Pc' + rest.rest <= Px'.Pc' + rho_x rho_c,    so    score = h - x'.c' >= h - [Px', rho_x].[Pc', rho_c].

The right-hand side is what _screen_kernel computes, for rows of 64 instead of D components; it keeps the two codes with the smallest bounds
and a third bound. _settle_reduced_kernel evaluates the scores of the two, an upper bound of the least one: if the third bound is above it,
no other code can be nearest. Directions may be any: only how many rows stay open depends on them. They come from the codebook.

Rounding, z for x' or c'. G = PP', delta = |G - 1| (Frobenius, measured; directions of length 0 left out), so P stretches by sqrt(1 + delta) at most,
and so does every subset of its columns. A partial sum over some components T is P_T z_T: no longer than sqrt(1 + delta) |z|, whatever T is. Computed
coordinates y^ therefore err by at most pi |z|, pi = sqrt(1 + delta) (D + 32) 2^-24: D sums, each rounded once, in one chain as compiled or in any order
that all directions share; sqrt(D) < 23 for products rounded on their own; the rest for what the errors themselves add. With the true projector
P'G^-1 P and delta <= 1/4:
    rho^2 <= |z|^2 - |y^|^2 + rest_rel |z|^2,   rest_rel = 2.3 pi + pi^2 + 2 delta + (D + 96) 2^-23     (the last for the sums of squares)
    x'.c' <= y^_x.y^_c + rho_x rho_c + epsilon |x'||c'|,   epsilon = 2.3 pi + pi^2 + 3 delta + 2^-22    (the last for z itself)
by |G^-1 - 1| <= delta / (1 - delta), |y| <= sqrt(1 + delta) |z|, |y - y^| <= pi |z|. rho^ = sqrt of the first right-hand side is used as rho. Then
|z| <= |[y^, rho^]| (1 + 2^-20), so that epsilon joins the accumulation error of the screen in X; see _prepare.py for X and w. Their constants
2^-40 and 2^-50 stand for squares that underflow: a length is short of its true value by less than 2^-58.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._exact import L2, _distance, _settle_first, _settle_rival
from ._prepare import HALF_STEP, ROW_MAX, _load_raw, _row_scale, _shift
from ._rows import _row_pointers
from ._screen import _load_triples

ROW = 64  # components of a reduced row: the directions and the rest
MOST_DIM = 512  # the directions are made orthonormal in registers: 64 x 512 numbers, 32 for each of 1,024 threads
SAMPLE = 2048  # codes that the directions are found from


@triton.jit
def _orthonormal_kernel(matrix, basis, D, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    """basis [G, COLUMNS, D] from the rows of matrix [G, COLUMNS, D] by modified Gram-Schmidt; zeros for dependent rows and the last one.

    One program per group holds the matrix in registers: COLUMNS steps of O(COLUMNS D).
    """
    g = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, COLUMNS)
    ds = tl.arange(0, BLOCK_D)
    inside = (ds < D)[None, :]
    y = tl.load(matrix + g * COLUMNS * D + rows[:, None] * D + ds[None, :], mask=inside & (rows < COLUMNS - 1)[:, None], other=0.0)
    for j in range(0, COLUMNS - 1):
        mine = rows == j
        v = tl.sum(tl.where(mine[:, None], y, 0.0), 0)  # [BLOCK_D]
        norm2 = tl.sum(v * v, 0)
        # Its length before all that: read again, because the lengths of all rows would not fit in registers beside them.
        given = tl.load(matrix + (g * COLUMNS + j) * D + ds, mask=ds < D, other=0.0)
        # What is left of a dependent row is rounding error: not orthogonal to the others.
        keep = (norm2 > 1e-8 * tl.sum(given * given, 0)) & (norm2 > 1e-30) & (norm2 < 1e30)
        v = tl.where(keep, v / tl.sqrt(tl.where(keep, norm2, 1.0)), 0.0)
        share = tl.where(rows > j, tl.sum(y * v[None, :], 1), 0.0)
        y = tl.where(mine[:, None], v[None, :], y - share[:, None] * v[None, :])
    tl.store(basis + g * COLUMNS * D + rows[:, None] * D + ds[None, :], y, mask=inside)


class Directions(NamedTuple):
    basis: Tensor  # [G, D, 64] float32, its last column zero
    rest_rel: Tensor  # [G] float32
    epsilon: Tensor  # [G] float32


def directions(single: Tensor, codes: int, dim: int) -> Directions:
    """Principal directions of prepared codes [G, Kp, P], nearly: two steps of subspace iteration that starts from codes. No host sync."""
    step = max(1, codes // SAMPLE)
    sample = single[:, :codes:step, :dim]
    # Codes far longer than the others would take all directions for themselves: they count as twice the median length.
    length = sample.norm(dim=2, keepdim=True)
    # Sorted: median() has no deterministic form on a GPU.
    middle = length.sort(dim=1).values[:, (length.shape[1] - 1) // 2, None]
    sample = sample * (2.0 * middle / length.clamp_min(1e-30)).clamp(max=1.0)
    start = sample[:, :: max(1, sample.shape[1] // ROW)][:, :ROW]
    matrix = torch.zeros((len(single), ROW, dim), dtype=torch.float32, device=single.device)
    matrix[:, : start.shape[1]] = start
    rows = torch.empty_like(matrix)
    for _ in range(2):
        matrix = (matrix @ sample.mT) @ sample
        matrix /= matrix.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
        _orthonormal_kernel[(len(single),)](matrix, rows, dim, COLUMNS=ROW, **_tuning.orthonormal(dim))
        matrix = rows
    return measured(rows.mT.contiguous())


def coordinate_error(dim: int, delta: Tensor) -> Tensor:
    """pi: what the computed coordinates [64] of a row of length 1 can be off by, summed in any order that all directions share."""
    return (1 + delta).sqrt() * (dim + 32) * 2.0**-24


def measured(basis: Tensor) -> Directions:
    """Any basis [G, D, 64] with a zero last column, with its bounds; columns too far from orthonormal become zero, which certifies little."""
    wide = basis.double()
    gram = wide.mT @ wide
    unit = torch.diag_embed((gram.diagonal(dim1=1, dim2=2) > 0).double())
    delta = (gram - unit).flatten(1).norm(dim=1)
    good = delta <= 0.25
    delta = torch.where(good, delta, 0.0) * (1 + 2.0**-20)
    pi = coordinate_error(basis.shape[1], delta)
    both = 2.3 * pi + pi * pi
    rest_rel = both + 2 * delta + (basis.shape[1] + 96) * 2.0**-23
    # 2^-20: these two are rounded to float32.
    wider = 1 + 2.0**-20
    return Directions(torch.where(good[:, None, None], basis, 0.0), (rest_rel * wider).float(), ((both + 3 * delta + 2.0**-22) * wider).float())


@triton.jit
def _reduced(y, norm2, rest_rel, COLUMNS: tl.constexpr):
    """Coordinates [BLOCK, COLUMNS] with the rest's length in the last column -> (that, rounded to float16, both norms and the rounding's)."""
    rest2 = norm2 * (1.0 + rest_rel) - tl.sum(y * y, 1)
    rho = tl.sqrt(tl.maximum(rest2, 0.0)) * (1.0 + 2.0**-22)
    y = tl.where((tl.arange(0, COLUMNS) == COLUMNS - 1)[None, :], rho[:, None], y)
    rounded = tl.where(tl.abs(y) < 32768.0, y, 0.0).to(tl.float16)
    lost = y - rounded.to(tl.float32)
    return rounded, tl.sqrt(tl.sum(y * y, 1)), tl.sqrt(tl.sum(lost * lost, 1))


@triton.jit
def _reduce_codes_kernel(
    single, width_single, basis, rest_rel, half, width, padded, row, D, accumulate,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """half [G, Kp, COLUMNS] and width [G, Kp] of BLOCK prepared codes; width_single stands for what `single` and the formula round."""
    g = tl.program_id(1).to(tl.int64)
    ks = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    y = tl.zeros([BLOCK, COLUMNS], tl.float32)
    norm2 = tl.zeros([BLOCK], tl.float32)
    for d in range(0, D, STEP):
        ds = d + tl.arange(0, STEP)
        c = tl.load(single + (g * padded + ks[:, None]) * row + ds[None, :], mask=(ds < D)[None, :], other=0.0)
        p = tl.load(basis + g * D * COLUMNS + ds[:, None] * COLUMNS + columns[None, :], mask=(ds < D)[:, None], other=0.0)
        y += tl.dot(c, p, input_precision="ieee")
        norm2 += tl.sum(c * c, 1)
    rounded, norm, lost = _reduced(y, norm2, tl.load(rest_rel + g), COLUMNS)
    tl.store(half + (g * padded + ks[:, None]) * COLUMNS + columns[None, :], rounded)
    wide = (lost + (HALF_STEP + accumulate) * (norm + lost)) * (1.0 + 2.0**-10) + tl.load(width_single + g * padded + ks) + 2.0**-50
    tl.store(width + g * padded + ks, wide)


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "first", "rows"], do_not_specialize_on_alignment=["stride_d"])
def _reduce_rows_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, first, rows, chosen, ready,
    centre, unit, basis, rest_rel, epsilon, half, row_width, row_scale, row_factor, accumulate,
    METRIC: tl.constexpr, CHOSEN: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """_rows_kernel for reduced rows: half [G, rows, COLUMNS], X, R as the screen takes it (1 but for l2) and R, of rows before ready[g].

    CHOSEN: row r of this launch is row chosen[r] of the slab.
    """
    g = tl.program_id(1).to(tl.int64)
    if tl.program_id(0).to(tl.int64) * BLOCK < tl.load(ready + g):
        r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = r < rows
        place = r
        if CHOSEN:
            place = tl.load(chosen + r, mask=valid, other=0).to(tl.int64)
        b = (first + place) // N
        pointers = _row_pointers(x, stride_b, stride_g, stride_n, b, g, first + place - b * N, ALIGN)
        scale = tl.load(unit + g) if METRIC == L2 else 1.0
        mu = centre + g * D
        largest = tl.zeros([BLOCK], tl.float32)
        bad = tl.zeros([BLOCK], tl.int32)
        for start in range(0, D, STEP):
            ds = start + tl.arange(0, STEP).to(tl.int64)
            raw = _load_raw(pointers, valid, ds, stride_d, D)
            bad += tl.sum((~(tl.abs(raw) < float("inf"))).to(tl.int32), 1)
            largest = tl.maximum(largest, tl.max(tl.abs(_shift(raw, ds, D, mu, scale, METRIC)), 1))
        far = ~(largest <= ROW_MAX) if METRIC == L2 else ~(largest < float("inf"))
        # Added to X at the end: a row that is not finite, one too large for a screen, one of ours.
        beyond = tl.where(bad > 0, float("nan"), tl.where(far, float("inf"), 0.0))
        usable = valid & (beyond == 0.0)
        scaled = _row_scale(tl.where(usable, largest, 1.0), METRIC)
        columns = tl.arange(0, COLUMNS)
        y = tl.zeros([BLOCK, COLUMNS], tl.float32)
        norm2 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, STEP):
            ds = start + tl.arange(0, STEP).to(tl.int64)
            z = _shift(_load_raw(pointers, usable, ds, stride_d, D), ds, D, mu, scale, METRIC) * scaled[:, None]
            z = tl.where(usable[:, None], z, 0.0)
            p = tl.load(basis + g * D * COLUMNS + ds[:, None] * COLUMNS + columns[None, :], mask=(ds < D)[:, None], other=0.0)
            y += tl.dot(z, p, input_precision="ieee")
            norm2 += tl.sum(z * z, 1)
        rounded, norm, lost = _reduced(y, norm2, tl.load(rest_rel + g), COLUMNS)
        tl.store(half + (g * rows + r[:, None]) * COLUMNS + columns[None, :], rounded, mask=valid[:, None])
        error = lost + (accumulate + tl.load(epsilon + g)) * norm
        width = tl.maximum(norm, error / (HALF_STEP + accumulate)) * (1.0 + 2.0**-9) + 2.0**-40
        tl.store(row_width + g * rows + r, width + beyond, mask=valid)
        tl.store(row_scale + g * rows + r, scaled if METRIC == L2 else tl.full([BLOCK], 1.0, tl.float32), mask=valid)
        tl.store(row_factor + g * rows + r, scaled, mask=valid)


@triton.jit
def _upper_bound(pointers, stride_d, mu, scale, x_scale, factor, code, D, offset, slack, width, METRIC: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Upper bound of R score of one prepared code per row: R h - z.c' in float32, and what that can be off by."""
    dot = tl.zeros([BLOCK], tl.float32)
    row2 = tl.zeros([BLOCK], tl.float32)
    code2 = tl.zeros([BLOCK], tl.float32)
    for d in range(0, D):
        z = tl.load(pointers).to(tl.float32)
        if METRIC == L2:
            z = (z - tl.load(mu + d)) * scale
        z = z * factor
        c = tl.load(code + d)
        dot += z * c
        row2 += z * z
        code2 += c * c
        pointers += stride_d
    # (D + 16) 2^-23 |z||c'| covers D products and sums, the roundings of z and c'; `width` the formula's own.
    off = ((D + 16) * 2.0**-23 * tl.sqrt(code2) + width) * tl.sqrt(row2) * (1.0 + 2.0**-9)
    high = x_scale * (offset + 2.0 * slack)
    return high - dot + off + 2.0**-20 * (tl.abs(high) + tl.abs(dot)) + 2.0**-90


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "first_row", "rows", "splits"], do_not_specialize_on_alignment=["stride_d"])
def _settle_reduced_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, first_row, rows, chosen, ready,
    codebook, code_stride_g, code_stride_k, code_stride_d, K,
    centre, unit, single, offset, slack, width_single, padded, row,
    row_width, row_scale, row_factor, evaluate, bounds, codes, splits,
    distance, indices, todo, todo_count,
    METRIC: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One lane a row: certify by evaluating the two candidates, decide by the formula, list what stays open and rows from ready[g] on."""
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = r < rows
    r = tl.minimum(r, rows - 1)
    place = r
    if CHOSEN:
        place = tl.load(chosen + r).to(tl.int64)
    still_open = valid
    if tl.program_id(0).to(tl.int64) * BLOCK_N < tl.load(ready + g):
        at = g * rows + r
        size = tl.num_programs(1).to(tl.int64) * rows
        best, first, second, other, third = _load_triples(bounds, codes, at, size, splits)
        x_width = tl.load(row_width + at)
        x_scale = tl.load(row_scale + at)
        factor = tl.load(row_factor + at)
        flat = first_row + place
        b = flat // N
        n = flat - b * N
        pointers = _row_pointers(x, stride_b, stride_g, stride_n, b, g, n, 1)
        scale = tl.load(unit + g) if METRIC == L2 else 1.0
        high = tl.full([BLOCK_N], float("inf"), tl.float32)
        for candidate in tl.static_range(2):
            k = (first if candidate == 0 else other).to(tl.int64)
            known = k < padded
            k = g * padded + tl.where(known, k, 0)
            bound = _upper_bound(
                pointers, stride_d, centre + g * D, scale, x_scale, factor, single + k * row, D,
                tl.load(offset + k), tl.load(slack + k), tl.load(width_single + k), METRIC, BLOCK_N,
            )  # fmt: skip
            high = tl.where(known & (bound < high), bound, high)  # false for NaN
        # As in _certify: the tile number in the bound's low bits, the contract's own rounding on both sides.
        limit = high + 2.0**-16 * tl.abs(high) + 2.0 * evaluate * x_width * (x_width / x_scale)
        bad = x_width != x_width
        certified = (third > limit) & (x_width < float("inf"))
        base = codebook + g * code_stride_g
        score, index = _settle_first(pointers, stride_d, base, code_stride_k, code_stride_d, K, D, first, METRIC, BLOCK_N)
        score, index = _settle_rival(
            score, index, pointers, stride_d, base, code_stride_k, code_stride_d, K, D, other, certified, METRIC, BLOCK_N
        )
        result = _distance(score, pointers, stride_d, D, METRIC, BLOCK_N)
        out = (b * tl.num_programs(1) + g) * N + n
        tl.store(distance + out, tl.where(bad, float("nan"), result), mask=valid & (certified | bad))
        tl.store(indices + out, tl.where(bad, 0, index), mask=valid & (certified | bad))
        still_open = valid & ~certified & ~bad
    count = tl.sum(still_open.to(tl.int32), 0)
    if count > 0:
        position = tl.atomic_add(todo_count + g, count) + tl.cumsum(still_open.to(tl.int32), 0) - 1
        tl.store(todo + g * rows + position, place.to(tl.int32), mask=still_open)

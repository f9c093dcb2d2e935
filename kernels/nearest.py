"""nearest on Triton: a fused screen that never holds N x K, a certificate per row, and the contract's formula where it matters.

    rows, codes --prepare--> float16 copies, bounds --screen--> two candidates and a third bound per row --settle--> code, distance
                                                                      rows that stay open, a list --resolve--> code, distance
    before it, for 128 components and more and many scores: the same in 63 principal directions (_principal.py); the above for its list

1. prepare (_prepare.py): centre and scale; O(N D + K D).
2. screen (_screen.py): every pair once on tensor cores. Rows of fewer than 16 components skip it: resolve takes them all.
3. settle: a row whose third bound lies above the upper bound of its best is certified: one candidate, or two that the contract's
   formula in float64 decides. Its distance is evaluated by the same formula. On encoder outputs that is all but about 1 % of the rows.
4. resolve: the other rows, gathered from a list whose length only the device knows: a float32 screen with a bound some 2^7 times
   tighter, and where even that leaves three codes (real ties, rows far outside the codebook) the formula for every code.

Every row's answer is the contract's, so neither the order of the list nor tile sizes, splits or hints can be seen in the result.
Extra memory: 6 bytes per code element, and per row of a launch of at most 2^20 rows 2 D + 40 bytes;
with principal directions 132 more bytes per code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _principal, _tuning
from ._exact import L2, _distance, _score, _settle_first, _settle_rival
from ._prepare import _centre_kernel, _codes_kernel, _duplicates_kernel, _rows_kernel
from ._rows import _row_pointers, row_alignment
from ._screen import _load_triples, _screen_kernel, _screen_rows_single
from ._triton import cdiv, group_parts, on_device, power_of_two, processors, shared_memory

ROWS_PER_LAUNCH = 1 << 20
CODE_TILE = 128  # codes are padded to a multiple of it


@triton.jit
def _certify(best, first, second, third, x_width, x_scale, width, slack, padded, evaluate):
    """-> (certified, two): whether at most two codes can be nearest, and whether the second is one of them. False for NaN and inf."""
    w = tl.load(width + first, mask=first < padded, other=float("inf"))
    s = tl.load(slack + first, mask=first < padded, other=float("inf"))
    upper = best + 2.0 * x_width * w + 2.0 * x_scale * s
    # 2^-16: the tile number in the low bits moves a bound by 2^-18 of itself. `evaluate` is the contract's own rounding error, per
    # |x'|^2, on both sides; 2^-90 stands for whatever underflows.
    limit = upper + 2.0**-16 * (tl.abs(best) + tl.abs(upper)) + 2.0 * evaluate * x_width * (x_width / x_scale) + 2.0**-90
    return third > limit, second <= limit


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "first_row", "rows", "splits"], do_not_specialize_on_alignment=["stride_d"])
def _settle_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, first_row, rows, chosen, ready,
    codebook, code_stride_g, code_stride_k, code_stride_d, K,
    row_width, row_scale, width, slack, padded, evaluate,
    bounds, codes, splits,
    distance, indices, todo, todo_count,
    METRIC: tl.constexpr, LISTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N rows, one lane a row: merge the splits, certify, evaluate one or two codes, list what stays open."""
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = r < rows
    place = r
    if LISTED:
        count = tl.load(ready + g)
        if tl.program_id(0).to(tl.int64) * BLOCK_N >= count:
            return
        valid = r < count
        place = tl.load(chosen + g * rows + r, mask=valid, other=0).to(tl.int64)
    at = g * rows + tl.minimum(r, rows - 1)
    size = tl.num_programs(1).to(tl.int64) * rows
    best, first, second, other, third = _load_triples(bounds, codes, at, size, splits)
    x_width = tl.load(row_width + at)
    certified, two = _certify(
        best, first, second, third, x_width, tl.load(row_scale + at), width + g * padded, slack + g * padded, padded, evaluate
    )
    bad = x_width != x_width
    flat = first_row + tl.minimum(place, rows - 1)
    b = flat // N
    n = flat - b * N
    pointers = _row_pointers(x, stride_b, stride_g, stride_n, b, g, n, 1)  # a lane reads one component at a time
    codebook += g * code_stride_g
    two = two & certified
    score, index = _settle_first(pointers, stride_d, codebook, code_stride_k, code_stride_d, K, D, first, METRIC, BLOCK_N)
    score, index = _settle_rival(
        score, index, pointers, stride_d, codebook, code_stride_k, code_stride_d, K, D, other, two, METRIC, BLOCK_N
    )
    result = _distance(score, pointers, stride_d, D, METRIC, BLOCK_N)
    out = (b * tl.num_programs(1) + g) * N + n
    tl.store(distance + out, tl.where(bad, float("nan"), result), mask=valid & (certified | bad))
    tl.store(indices + out, tl.where(bad, 0, index), mask=valid & (certified | bad))
    open_rows = (valid & ~certified & ~bad).to(tl.int32)
    listed = tl.sum(open_rows, 0)
    if listed > 0:
        # The order of the list depends on timing; what is computed for a row does not depend on its place in it.
        position = tl.atomic_add(todo_count + g, listed) + tl.cumsum(open_rows, 0) - 1
        tl.store(todo + g * rows + position, place.to(tl.int32), mask=open_rows > 0)


@triton.jit
def _search_all(pointers, stride_d, codes, stride_k, code_stride_d, K, D, METRIC: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Score and index of the nearest code of each row by the formula alone: K D float64 operations a row."""
    score = tl.full([BLOCK_N], float("inf"), tl.float64)
    index = tl.zeros([BLOCK_N], tl.int64)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = k < K
        row, code = pointers, codes + k * stride_k
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float64)
        norm = tl.zeros([BLOCK_K], tl.float64)
        for d in range(0, D):
            xd = tl.load(row).to(tl.float32).to(tl.float64)[:, None]
            cd = tl.load(code, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            if METRIC == L2:
                difference = xd - cd[None, :]
                total = total + difference * difference
            else:
                total = total + xd * cd[None, :]
                norm = norm + cd * cd
            row += stride_d
            code += code_stride_d
        scores = tl.where(inside[None, :], _score(total, norm[None, :], METRIC), float("inf"))
        low = tl.min(scores, 1)
        where = tl.min(tl.where(scores == low[:, None], k[None, :], K), 1)
        # Tiles ascend, so a strict comparison keeps the lowest index.
        index = tl.where(low < score, where, index)
        score = tl.minimum(low, score)
    return score, index


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "first_row", "rows"], do_not_specialize_on_alignment=["stride_d"])
def _resolve_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, first_row, rows,
    codebook, code_stride_g, code_stride_k, code_stride_d, K,
    centre, unit, single, offset, width, slack, padded, half_row, accumulate, evaluate,
    distance, indices, todo, todo_count,
    METRIC: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ALL: tl.constexpr,
):  # fmt: skip
    """All that is left of a row: float32 screen, certificate, formula. Programs stride over the list (or over all rows)."""
    g = tl.program_id(1).to(tl.int64)
    count = tl.load(todo_count + g).to(tl.int64) if LISTED else rows
    codes = codebook + g * code_stride_g
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_N, count, tl.num_programs(0).to(tl.int64) * BLOCK_N):
        r = start + tl.arange(0, BLOCK_N).to(tl.int64)
        valid = r < count
        r = tl.minimum(r, count - 1)
        if LISTED:
            r = tl.load(todo + g * rows + r).to(tl.int64)
        flat = first_row + r
        b = flat // N
        n = flat - b * N
        pointers = _row_pointers(x, stride_b, stride_g, stride_n, b, g, n, ALIGN)
        best, first, second, other, third, x_width, x_scale = _screen_rows_single(
            pointers, valid, stride_d, D, centre + g * D, tl.load(unit + g), accumulate,
            single + g * padded * half_row, offset + g * padded, width + g * padded, padded, half_row,
            METRIC, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        certified, two = _certify(
            best, first, second, third, x_width, x_scale, width + g * padded, slack + g * padded, padded, evaluate
        )
        bad = x_width != x_width
        score, index = _settle_first(pointers, stride_d, codes, code_stride_k, code_stride_d, K, D, first, METRIC, BLOCK_N)
        score, index = _settle_rival(
            score, index, pointers, stride_d, codes, code_stride_k, code_stride_d, K, D, other, two & certified, METRIC, BLOCK_N
        )
        still_open = ~certified & ~bad & valid
        if tl.max(still_open.to(tl.int32), 0) > 0:
            full_score, full_index = _search_all(
                pointers, stride_d, codes, code_stride_k, code_stride_d, K, D, METRIC, BLOCK_N, BLOCK_ALL
            )
            score = tl.where(still_open, full_score, score)
            index = tl.where(still_open, full_index, index)
        result = _distance(score, pointers, stride_d, D, METRIC, BLOCK_N)
        out = (b * tl.num_programs(1) + g) * N + n
        tl.store(distance + out, tl.where(bad, float("nan"), result), mask=valid)
        tl.store(indices + out, tl.where(bad, 0, index), mask=valid)


# ---- host ------------------------------------------------------------------------------------------------------------------


class _Codes(NamedTuple):
    """A codebook as the screens read it; Kp and P are K and D, padded."""

    half: Tensor  # [G, Kp, P] float16
    single: Tensor  # [G, Kp, P] float32
    offset: Tensor  # [G, Kp] float32, lower bound of h
    width_half: Tensor  # [G, Kp] float32, w of the float16 screen
    width_single: Tensor  # [G, Kp] float32, w of the float32 screen
    slack: Tensor  # [G, Kp] float32
    centre: Tensor  # [G, D] float32
    unit: Tensor  # [G] float32

    @property
    def padded(self) -> int:
        return self.single.shape[1]

    @property
    def row(self) -> int:
        return self.single.shape[2]


def accumulation_error(row: int) -> float:
    """Relative error of a dot product of `row` terms on tensor cores, against |a||b|.

    They add blocks of at least 4 exact products and the running sum, aligned to the largest and cut to 24 bits or more: each of the
    row + row / 4 addends loses less than 2^-23 of the largest partial sum. (Fasi, Higham, Mikaitis, Pranesh 2021, for V100 to A100.)
    """
    return (row + 16) * 2.0**-22


def evaluation_error(dim: int) -> float:
    """Relative error of the contract's own float64 sum."""
    return (dim + 8) * 2.0**-53


def _prepare_codes(codebook: Tensor, metric: int, row: int, half: bool) -> _Codes:
    g, k, d = codebook.shape
    padded = cdiv(k, CODE_TILE) * CODE_TILE
    floats = lambda *shape: torch.empty(shape, dtype=torch.float32, device=codebook.device)  # noqa: E731
    codes = _Codes(
        torch.empty((g, padded if half else 0, row), dtype=torch.float16, device=codebook.device),
        floats(g, padded, row), floats(g, padded), floats(g, padded), floats(g, padded), floats(g, padded), floats(g, d), floats(g),
    )  # fmt: skip
    hashes = torch.empty((g, padded), dtype=torch.int32, device=codebook.device)
    table = torch.full((g, 2 * power_of_two(k)), 2**31 - 1, dtype=torch.int32, device=codebook.device)
    shape = (codebook, *codebook.stride(), k, d)
    tile = _tuning.PREPARE
    _centre_kernel[(g,)](*shape, codes.centre, codes.unit, METRIC=metric, **_tuning.CENTRE)
    grid = (cdiv(padded, tile["BLOCK"]), g)
    _codes_kernel[grid](
        *shape, codes.centre, codes.unit, *codes[:6], hashes, table, table.shape[1], padded, row, accumulation_error(row),
        (row + 8) * 1.0625 * 2.0**-24, evaluation_error(d), METRIC=metric, HALF=half, **tile,
    )  # fmt: skip
    _duplicates_kernel[grid](*shape, codes.offset, codes.slack, hashes, table, table.shape[1], padded, **tile)
    return codes


class _Listed(NamedTuple):
    """Rows of a slab that are left, on the device."""

    rows: Tensor  # [G, rows] int32
    count: Tensor  # [G] int32


def _screen_half(x, rows_of_x, codes: _Codes, metric: int, config: dict, listed: _Listed | None):
    """Launch rows and screen on one slab of rows, or on those listed of it; returns what settle reads."""
    first, rows = rows_of_x
    groups, n, d = x.shape[1:]
    empty = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    half = empty(torch.float16, groups, rows, codes.row)
    # Two allocations: halves of one would differ in alignment from one N to the next, and Triton compiles per alignment.
    row_width, row_scale = empty(torch.float32, groups, rows), empty(torch.float32, groups, rows)
    _rows_kernel[(cdiv(rows, _tuning.ROWS["BLOCK"]), groups)](
        x, *x.stride(), n, d, first, rows, *(listed or (half, half)), codes.centre, codes.unit, half, row_width, row_scale, codes.row,
        accumulation_error(codes.row), METRIC=metric, LISTED=listed is not None, ALIGN=row_alignment(x), **_tuning.ROWS,
    )  # fmt: skip
    found = _launch_screen((half, row_width, row_scale), codes.half, codes.width_half, codes, config, listed and listed.count)
    return row_width, row_scale, *found


def _launch_screen(reduced_or_whole, half_codes: Tensor, width: Tensor, codes: _Codes, config: dict, ready: Tensor | None):
    """-> bounds [S, 3, G, rows], codes [S, 2, G, rows] and S."""
    half, row_width, row_scale = reduced_or_whole
    groups, rows, row = half.shape
    empty = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=half.device)  # noqa: E731
    tiles, code_tiles = cdiv(rows, config["BLOCK_N"]), codes.padded // config["BLOCK_K"]
    # Few rows: several programs share a row tile's codes, so that two waves of the machine have work.
    splits = max(1, min(code_tiles, 2 * processors(half) // (tiles * groups)))
    per_split = cdiv(code_tiles, splits)
    splits = cdiv(code_tiles, per_split)
    bounds = empty(torch.float32, splits, 3, groups, rows)
    found = empty(torch.int32, splits, 2, groups, rows)
    _screen_kernel[(tiles, splits, groups)](
        half, row_width, row_scale, rows, row_scale if ready is None else ready, half_codes, codes.offset, width, codes.padded, row,
        bounds, found, per_split, LISTED=ready is not None, **config,
    )  # fmt: skip
    return bounds, found, splits


def nearest_triton(
    x: Tensor, codebook: Tensor, metric: int, order: Tensor | None = None, basis: Tensor | None = None, guess: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's nearest code and distance of every row; the hints are not used yet.

    **Shapes**: x [B, G, N, D] float32, float16 or bfloat16, any strides; codebook [G, K, D] -> distance float32, indices int64 [B, G, N].
    """
    b, g, n, d = x.shape
    if len(parts := group_parts(g)) > 1:
        found = zip(*(nearest_triton(x[:, part], codebook[part], metric) for part in parts))
        return tuple(torch.cat(results, 1) for results in found)
    distance = torch.empty((b, g, n), dtype=torch.float32, device=x.device)
    indices = torch.empty((b, g, n), dtype=torch.int64, device=x.device)
    if not distance.numel():
        return distance, indices
    with on_device(x):
        config = _tuning.screen(d, shared_memory(x))
        codes = _prepare_codes(codebook, metric, config.row, config.half)
        slab = max(1, ROWS_PER_LAUNCH // g)
        reduced = _reduce_codes(codes, codebook.shape[1], d) if _worth_reducing(d, codes.padded, min(slab, b * n)) else None
        for first in range(0, b * n, slab):
            _search((first, min(slab, b * n - first)), x, codebook, codes, metric, config, distance, indices, reduced)
    return distance, indices


def _search(
    rows_of_x, x, codebook, codes: _Codes, metric: int, config, distance: Tensor, indices: Tensor, reduced: _Reduced | None = None
) -> Tensor:
    """Search one slab of rows, in principal directions first where they are given; returns how many rows of each group the screen of
    whole rows left open, [G] int32."""
    first, rows = rows_of_x
    g, n, d = x.shape[1:]
    k = codebook.shape[1]
    where = (x, *x.stride(), n, d, first, rows)
    codes_in = (codebook, *codebook.stride(), k)
    listed = None if reduced is None else _search_reduced(rows_of_x, x, codebook, codes, reduced, metric, distance, indices)
    evaluate = evaluation_error(d) if metric == L2.value else 0.0
    todo_count = torch.zeros(g, dtype=torch.int32, device=x.device)
    todo = torch.empty((g, rows if config.half else 0), dtype=torch.int32, device=x.device)
    if config.half:
        row_width, row_scale, bounds, found, splits = _screen_half(x, rows_of_x, codes, metric, config.kernel, listed)
        _settle_kernel[(cdiv(rows, _tuning.SETTLE["BLOCK_N"]), g)](
            *where, *(listed or (todo, todo)), *codes_in, row_width, row_scale, codes.width_half, codes.slack, codes.padded, evaluate,
            bounds, found, splits, distance, indices, todo, todo_count, METRIC=metric, LISTED=listed is not None, **_tuning.SETTLE, enable_fp_fusion=False,
        )  # fmt: skip
    tile = _tuning.resolve(config.row)
    programs = min(cdiv(rows, tile["BLOCK_N"]), _tuning.RESOLVE_WAVES * processors(x))
    _resolve_kernel[(programs, g)](
        *where, *codes_in, codes.centre, codes.unit, codes.single, codes.offset, codes.width_single, codes.slack, codes.padded, codes.row,
        accumulation_error(codes.row), evaluate, distance, indices, todo, todo_count, METRIC=metric, LISTED=config.half, ALIGN=row_alignment(x), **tile,
        enable_fp_fusion=False,
    )  # fmt: skip
    return todo_count


# ---- principal directions --------------------------------------------------------------------------------------------------


class _Reduced(NamedTuple):
    """A codebook in principal directions (_principal.py)."""

    directions: _principal.Directions
    half: Tensor  # [G, Kp, 64] float16
    width: Tensor  # [G, Kp] float32


def _worth_reducing(dim: int, codes: int, rows: int) -> bool:
    """By the number of scores: below this the pilot and the directions cost more than they can save."""
    return _tuning.REDUCED_DIM <= dim <= _principal.MOST_DIM and rows >= 4 * _tuning.PILOT and rows * codes >= _tuning.REDUCED_SCORES


def _reduce_codes(codes: _Codes, codebook_size: int, dim: int) -> _Reduced:
    g, padded, row = codes.single.shape
    columns = _principal.ROW
    directions = _principal.directions(codes.single, codebook_size, dim)
    half = torch.empty((g, padded, columns), dtype=torch.float16, device=codes.single.device)
    width = torch.empty((g, padded), dtype=torch.float32, device=codes.single.device)
    tile = _tuning.REDUCE
    _principal._reduce_codes_kernel[(padded // tile["BLOCK"], g)](
        codes.single, codes.width_single, *directions[:2], half, width, padded, row, dim, accumulation_error(columns),
        COLUMNS=columns, **tile,
    )  # fmt: skip
    return _Reduced(directions, half, width)


def _search_reduced(rows_of_x, x, codebook, codes: _Codes, reduced: _Reduced, metric: int, distance: Tensor, indices: Tensor) -> _Listed:
    """Write the answers that the principal-direction screen certifies and list the other rows; all of them after a bad pilot.

    The pilot is the same screen on rows spread over the slab. Its count stays on the device, where it decides.
    """
    first, rows = rows_of_x
    g, n, d = x.shape[1:]
    empty = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    evaluate = evaluation_error(d) if metric == L2.value else 0.0
    config = _tuning.screen(_principal.ROW, shared_memory(x)).kernel

    def screen(count: int, chosen: Tensor | None, ready: Tensor) -> _Listed:
        half = empty(torch.float16, g, count, _principal.ROW)
        row_width, row_scale, row_factor = (empty(torch.float32, g, count) for _ in range(3))
        where = (x, *x.stride(), n, d, first, count, half if chosen is None else chosen, ready)
        tile = _tuning.REDUCE
        _principal._reduce_rows_kernel[(cdiv(count, tile["BLOCK"]), g)](
            *where, codes.centre, codes.unit, *reduced.directions, half, row_width, row_scale, row_factor,
            accumulation_error(_principal.ROW), METRIC=metric, CHOSEN=chosen is not None, ALIGN=row_alignment(x),
            COLUMNS=_principal.ROW, **tile,
        )  # fmt: skip
        bounds, found, splits = _launch_screen((half, row_width, row_scale), reduced.half, reduced.width, codes, config, ready)
        left = _Listed(empty(torch.int32, g, count), torch.zeros(g, dtype=torch.int32, device=x.device))
        _principal._settle_reduced_kernel[(cdiv(count, _tuning.SETTLE["BLOCK_N"]), g)](
            *where, codebook, *codebook.stride(), codebook.shape[1], codes.centre, codes.unit, codes.single, codes.offset, codes.slack,
            codes.width_single, codes.padded, codes.row, row_width, row_scale, row_factor, evaluate, bounds, found, splits,
            distance, indices, *left, METRIC=metric, CHOSEN=chosen is not None, **_tuning.SETTLE, enable_fp_fusion=False,
        )  # fmt: skip
        return left

    pilot = _tuning.PILOT
    spread = (torch.arange(pilot, device=x.device) * rows // pilot).to(torch.int32)
    tried = screen(pilot, spread, torch.full((g,), pilot, dtype=torch.int32, device=x.device))
    return screen(rows, None, torch.where(tried.count <= pilot // _tuning.PILOT_SHARE, rows, 0).to(torch.int32))

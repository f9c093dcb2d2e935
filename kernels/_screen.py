"""Two fused searches over all codes, one on tensor cores (float16), one in float32; both keep, per row, what certifies the answer.

A screen sees s_nk = R_n h_k - X_n w_k - zz_n.cc_k, a lower bound of the true score of row n and code k (see _prepare.py for the
symbols), and never stores it. It keeps per row the two codes with the smallest bounds, (best, first_code) and (second, second_code), and
`third`, which no other code's bound lies below. If the best code's *upper* bound is under `third`, two codes at most can be nearest.
"""

import triton
import triton.language as tl

from ._exact import L2
from ._prepare import ROW_MAX, _load_raw, _row_scale, _shift

# Low bits of a bound hold the number of its tile of codes, 0..31: one minimum then carries value and place together. The bound moves by
# less than 32 ulps, 2^-18 of itself, which settle allows for.
TILES = tl.constexpr(32)


@triton.jit
def _keep_two(bound, tile, low, high):
    """Per element: insert `bound`, tagged with its tile, into the two smallest so far. 1 LOP3, 2 min, 1 max per score."""
    tagged = ((bound.to(tl.int32, bitcast=True) & -32) | tile).to(tl.float32, bitcast=True)
    return tl.minimum(low, tagged), tl.minimum(high, tl.maximum(low, tagged))


@triton.jit
def _reduce_two(low, high, start, best, first, second, other, third, BLOCK_K: tl.constexpr):
    """Merge the per-column pairs of up to 32 tiles, [BLOCK_N, BLOCK_K], into the per-row triple; `start` is the first tile's code."""
    column = tl.arange(0, BLOCK_K)[None, :]
    a = tl.min(low, 1)
    a_column = tl.min(tl.where(low == a[:, None], column, BLOCK_K), 1)
    # Without the smallest: its column shows its second one instead. Codes that no pair kept lie above their column's `high`, and a
    # column's `high` enters the next minimum as soon as its `low` is taken: no code below `c` is forgotten.
    rest = tl.where(column == a_column[:, None], high, low)
    b = tl.min(rest, 1)
    b_column = tl.min(tl.where(rest == b[:, None], column, BLOCK_K), 1)
    c = tl.min(tl.where((column == a_column[:, None]) | (column == b_column[:, None]), high, low), 1)
    a_code = start + (a.to(tl.int32, bitcast=True) & 31) * BLOCK_K + a_column
    b_code = start + (b.to(tl.int32, bitcast=True) & 31) * BLOCK_K + b_column
    return _merge_two(best, first, second, other, third, a, a_code, b, b_code, c)


@triton.jit
def _merge_two(best, first, second, other, third, a, a_code, b, b_code, c):
    """Two triples of disjoint code sets -> the triple of their union. All [BLOCK_N]."""
    swap = a < best
    low_code = tl.where(swap, a_code, first)
    upper, upper_code = tl.where(swap, best, a), tl.where(swap, first, a_code)
    take = b < second
    lower, lower_code = tl.where(take, b, second), tl.where(take, b_code, other)
    near = upper < lower
    middle, middle_code = tl.where(near, upper, lower), tl.where(near, upper_code, lower_code)
    third = tl.minimum(tl.minimum(third, c), tl.maximum(upper, lower))
    return tl.minimum(a, best), low_code, middle, middle_code, third


@triton.jit
def _load_triples(bounds, codes, at, size, splits):
    """The triple of rows `at`, merged over the splits of the codes."""
    best = tl.load(bounds + at)
    second = tl.load(bounds + at + size)
    third = tl.load(bounds + at + 2 * size)
    first = tl.load(codes + at)
    other = tl.load(codes + at + size)
    for split in range(1, splits):
        bounds += 3 * size
        codes += 2 * size
        best, first, second, other, third = _merge_two(
            best, first, second, other, third,
            tl.load(bounds + at), tl.load(codes + at), tl.load(bounds + at + size), tl.load(codes + at + size),
            tl.load(bounds + at + 2 * size),
        )  # fmt: skip
    return best, first, second, other, third


@triton.jit(do_not_specialize=["rows", "tiles_per_split"])
def _screen_kernel(
    half_x, row_width, row_scale, rows, ready,
    half_c, offset, width, padded, half_row,
    bounds, codes, tiles_per_split,
    LISTED: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Float16 products, float32 accumulation: one program owns BLOCK_N rows and `tiles_per_split` tiles of BLOCK_K codes.

    bounds [S, 3, G, rows] float32 and codes [S, 2, G, rows] int32 receive the triples, S the number of splits of the codes.
    Bytes per row tile: P BLOCK_N once (WHOLE_ROW, the tile then stays on chip) plus 2 P per code, from L2. Per score: P
    multiply-adds on tensor cores, 2 FMA, 1 LOP3, 3 min or max. LISTED: only the first ready[g] rows are there.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    g = tl.program_id(2).to(tl.int64)
    if LISTED:
        if tile * BLOCK_N >= tl.load(ready + g):
            return
    r = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = g * rows + tl.minimum(r, rows - 1)
    ds = tl.arange(0, BLOCK_D)
    ks = tl.arange(0, BLOCK_K)
    inside_c = ks[None, :] * half_row + ds[:, None]
    x_width = tl.load(row_width + row)
    x_width = tl.where(x_width < float("inf"), x_width, 0.0)[:, None]  # rows without a screen are settled elsewhere
    x_scale = tl.load(row_scale + row)[:, None]
    x_tile = half_x + row[:, None] * half_row + ds[None, :]
    if WHOLE_ROW:
        x = tl.load(x_tile)  # [BLOCK_N, BLOCK_D]
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    second, third = best, best
    first = tl.zeros([BLOCK_N], tl.int32)
    other = first
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, padded // BLOCK_K)
    for chunk in range(begin, end, TILES):
        start = chunk * BLOCK_K
        low = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
        high = low
        tiles = tl.minimum(end - chunk, TILES).to(tl.int32)
        for t in range(0, tiles):
            at = g * padded + start + t * BLOCK_K  # 64-bit, but one per tile: offsets inside a tile are 32-bit and save registers
            c_tile = half_c + at * half_row + inside_c  # [BLOCK_D, BLOCK_K]
            if WHOLE_ROW:
                product = tl.dot(x, tl.load(c_tile))
            else:
                product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for d in range(0, half_row, BLOCK_D):
                    product = tl.dot(tl.load(x_tile + d), tl.load(c_tile + d), product)
            h = tl.load(offset + at + ks)[None, :]
            w = tl.load(width + at + ks)[None, :]
            low, high = _keep_two(x_scale * h - x_width * w - product, t, low, high)
        best, first, second, other, third = _reduce_two(
            low, high, start.to(tl.int32), best, first, second, other, third, BLOCK_K
        )
    size = tl.num_programs(2).to(tl.int64) * rows
    inside = r < rows
    at = split * 3 * size + g * rows + r
    tl.store(bounds + at, best, mask=inside)
    tl.store(bounds + at + size, second, mask=inside)
    tl.store(bounds + at + 2 * size, third, mask=inside)
    at = split * 2 * size + g * rows + r
    tl.store(codes + at, first, mask=inside)
    tl.store(codes + at + size, other, mask=inside)


@triton.jit
def _screen_rows_single(
    pointers, valid, stride_d, D, centre, unit, accumulate,
    single_c, offset, width, padded, half_row,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same triple for BLOCK_N rows at `pointers`, in float32. Returns it with X and R; X is inf or NaN where it certifies nothing."""
    largest = tl.zeros([BLOCK_N], tl.float32)
    norm2 = tl.zeros([BLOCK_N], tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for d in range(0, D, BLOCK_D):
        ds = d + tl.arange(0, BLOCK_D).to(tl.int64)
        raw = _load_raw(pointers, valid, ds, stride_d, D)
        bad += tl.sum((~(tl.abs(raw) < float("inf"))).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.abs(_shift(raw, ds, D, centre, unit, METRIC)), 1))
    far = ~(largest <= ROW_MAX) if METRIC == L2 else ~(largest < float("inf"))
    skip = far | (bad > 0)
    usable = valid & ~skip
    scale = _row_scale(tl.where(usable, largest, 1.0), METRIC)
    for d in range(0, D, BLOCK_D):
        ds = d + tl.arange(0, BLOCK_D).to(tl.int64)
        z = _shift(_load_raw(pointers, usable, ds, stride_d, D), ds, D, centre, unit, METRIC) * scale[:, None]
        z = tl.where(usable[:, None], z, 0.0)
        norm2 += tl.sum(z * z, 1)
    x_width = tl.sqrt(norm2) * (1.0 + 2.0**-10 + accumulate) + 2.0**-50
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    second, third = best, best
    first = tl.zeros([BLOCK_N], tl.int32)
    other = first
    ks = tl.arange(0, BLOCK_K)
    inside_c = ks[None, :] * half_row + tl.arange(0, BLOCK_D)[:, None]
    long_row = tl.cast(half_row, tl.int64)
    x_scale = scale if METRIC == L2 else tl.full([BLOCK_N], 1.0, tl.float32)
    for start in range(0, padded, TILES * BLOCK_K):
        low = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
        high = low
        tiles = tl.minimum((padded - start) // BLOCK_K, TILES)
        for t in range(0, tiles):
            at = start + t * BLOCK_K
            product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d in range(0, half_row, BLOCK_D):
                ds = d + tl.arange(0, BLOCK_D).to(tl.int64)
                z = _shift(_load_raw(pointers, usable, ds, stride_d, D), ds, D, centre, unit, METRIC) * scale[:, None]
                z = tl.where(usable[:, None], z, 0.0)
                c = tl.load(single_c + at * long_row + d + inside_c)
                product = tl.dot(z, c, product, input_precision="ieee")
            h = tl.load(offset + at + ks)[None, :]
            w = tl.load(width + at + ks)[None, :]
            low, high = _keep_two(x_scale[:, None] * h - x_width[:, None] * w - product, t, low, high)
        best, first, second, other, third = _reduce_two(low, high, start, best, first, second, other, third, BLOCK_K)
    x_width = tl.where(bad > 0, float("nan"), tl.where(far, float("inf"), x_width))
    return best, first, second, other, third, x_width, x_scale

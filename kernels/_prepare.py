"""What the screens read: centred, scaled copies of codes and rows, and the numbers from which their certificates follow.

Notation, for one row x and one code c of D components:
    mu      any point near the codes (l2; 0 for x under dot and cosine), 2^-g a power of two: both change efficiency, never a result
    c'      (c - mu) 2^-g for l2 and dot, (c / |c| - mu) for cosine;      x' = (x - mu) 2^-g for l2, x otherwise
    score   h - x'.c' with h = |c'|^2 / 2 for l2 and 0 otherwise: for one row it orders the codes as the contract's formula does
    R       a power of two per row that brings max |x'_d| into [1, 2);    z = R x'
A screen computes s = R h - zz.cc from rounded zz ~ z, cc ~ c'. Cauchy-Schwarz on  z.c' - zz.cc = (z - zz).cc + z.(c' - cc)  gives

    |s - R score| <= |z - zz| |cc| + |z| |c' - cc| + (accumulation) |z||c'|  <=  X w,

with X a number of the row and w one of the code, from *measured* residual norms, so that underflow is covered too. One product X w per
pair keeps a code of huge norm from spoiling the bound of the others.
"""

import triton
import triton.language as tl

from ._exact import COSINE, DOT, L2
from ._rows import _row_pointers

# A score that no row accepts. Rows are screened when their largest component is at most 2^30 (in units of 2^g), so that for D < 2^30
# every sum below stays finite in float32: R <= 2^28 and R DROPPED <= 2^126.
DROPPED = tl.constexpr(2.0**98)
# A code beyond 2^48 units: |c'| (|c'| / 2 - |x'|) >= 2^94 for every screened row (|x'| <= 2^46), which bounds its l2 score from below.
FAR = tl.constexpr(2.0**94)
FAR_NORM2 = tl.constexpr(2.0**96)
ROW_MAX = tl.constexpr(2.0**30)
ROW_MIN = tl.constexpr(2.0**-28)
HALF_MAX = tl.constexpr(32768.0)
# X w splits the row's error over |cc|: X = |z| max(1, (|z - zz| / |z| + accumulation) / HALF_STEP). 2^-12 is the typical relative
# residual of a rounding to 11 bits (its largest value is 2^-11), so that the max is usually 1.
HALF_STEP = tl.constexpr(2.0**-12)
SAMPLE = tl.constexpr(64)


@triton.jit
def _power_of_two_below(value):
    """[..] float64 > 0 -> exponent of the largest power of two that is not above it, clamped to what float32 holds."""
    bits = value.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 2047) - 1023
    return tl.minimum(tl.maximum(exponent, -126), 126)


@triton.jit
def _rank(value, keep):
    """[SAMPLE] -> how many kept values come before each one."""
    i = tl.arange(0, SAMPLE)
    before = (value[None, :] < value[:, None]) | ((value[None, :] == value[:, None]) & (i[None, :] < i[:, None]))
    return tl.sum((before & keep[None, :]).to(tl.int32), 1)


@triton.jit
def _median(value, keep):
    middle = keep & (_rank(value, keep) == tl.sum(keep.to(tl.int32)) // 2)
    return tl.sum(tl.where(middle, value, 0.0))


@triton.jit
def _load_codes(base, ks, ds, stride_k, stride_d, K, D):
    """[BLOCK, BLOCK_D] float64 values of codes ks, 0 outside."""
    inside = (ks < K)[:, None] & (ds < D)[None, :]
    c = tl.load(base + ks[:, None] * stride_k + ds[None, :] * stride_d, mask=inside, other=0.0)
    return c.to(tl.float32).to(tl.float64)


@triton.jit
def _centre_kernel(
    codebook, stride_g, stride_k, stride_d, K, D,
    centre, unit,
    METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """centre[g, D] = mu and unit[g] = 2^-g from at most 64 codes spread over the codebook. One program per group.

    Codes more than 8 times longer than the median one do not enter the mean: one code at 1e30 would cost all others their digits.
    """
    g = tl.program_id(0).to(tl.int64)
    base = codebook + g * stride_g
    ks = tl.arange(0, SAMPLE).to(tl.int64) * tl.maximum(K // SAMPLE, 1)
    norm2 = tl.zeros([SAMPLE], tl.float64)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        c = _load_codes(base, ks, ds, stride_k, stride_d, K, D)
        norm2 += tl.sum(c * c, 1)
    keep = (ks < K) & (norm2 < float("inf"))
    near = keep & (norm2 <= 64.0 * _median(norm2, keep))
    weight = tl.where(near, 1.0 / tl.maximum(tl.sum(near.to(tl.float64)), 1.0), 0.0)  # [SAMPLE]
    length = tl.full([SAMPLE], 1.0, tl.float64)
    if METRIC == COSINE:
        length = tl.where(norm2 > 0.0, 1.0 / tl.sqrt(tl.where(norm2 > 0.0, norm2, 1.0)), 0.0)
    spread2 = tl.zeros([SAMPLE], tl.float64)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        c = _load_codes(base, ks, ds, stride_k, stride_d, K, D)
        c = tl.where(keep[:, None], c, 0.0) * length[:, None]
        mean = tl.sum(c * weight[:, None], 0).to(tl.float32)  # [BLOCK_D]
        tl.store(centre + g * D + ds, mean, mask=ds < D)
        difference = tl.where(keep[:, None], c - mean.to(tl.float64)[None, :], 0.0)
        spread2 += tl.sum(difference * difference, 1)
    if METRIC == COSINE:
        tl.store(unit + g, 1.0)
    else:
        # l2: a typical code has length 1. dot: long codes win, so the longest one has.
        typical = _median(spread2, keep) if METRIC == L2 else tl.max(tl.where(keep, spread2, 0.0))
        exponent = tl.where(typical > 0.0, _power_of_two_below(tl.sqrt(typical)), 0)
        tl.store(unit + g, ((127 - exponent) << 23).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _codes_kernel(
    codebook, stride_g, stride_k, stride_d, K, D,
    centre, unit,
    half, single, offset, width_half, width_single, slack,
    hashes, table, table_size, padded, half_row, half_accumulate, single_step, evaluate,
    METRIC: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Prepare BLOCK codes of one group: 3 reads of the codebook, O(K D) in all.

    half [G, Kp, P] float16 and single [G, Kp, P] float32 hold c' (Kp, P = K, D padded: zeros and DROPPED beyond, so that the screens
    need no masks); offset = h - slack, a lower bound of h;
    width_half and width_single the w of the two screens; slack bounds the rounding of h and of the screen's epilogue.
    table[hash] keeps the lowest code of each hash, for _duplicates_kernel.
    """
    g = tl.program_id(1).to(tl.int64)
    ks = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = codebook + g * stride_g
    scale = tl.load(unit + g).to(tl.float64)
    norm2 = tl.zeros([BLOCK], tl.float64)
    mixed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        c = _load_codes(base, ks, ds, stride_k, stride_d, K, D)
        norm2 += tl.sum(c * c, 1)
        bits = (c.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes 0 of -0: equal values, equal hash
        mixed += tl.sum((bits ^ (bits >> 15)) * ((2 * ds + 1) * 40503 * 65599).to(tl.int32)[None, :], 1)
    finite = (norm2 < float("inf")) & (ks < K)
    length = tl.full([BLOCK], 1.0, tl.float64)
    if METRIC == COSINE:
        length = tl.where(norm2 > 0.0, 1.0 / tl.sqrt(tl.where(norm2 > 0.0, norm2, 1.0)), 0.0)

    inner2 = tl.zeros([BLOCK], tl.float64)  # |c'|^2
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mu = tl.load(centre + g * D + ds, mask=ds < D, other=0.0).to(tl.float64)
        c = (_load_codes(base, ks, ds, stride_k, stride_d, K, D) * length[:, None] - mu[None, :]) * scale
        inner2 += tl.sum(c * c, 1)
    far = ~(inner2 <= FAR_NORM2)
    screened = finite & ~far

    rest2 = tl.zeros([BLOCK], tl.float64)  # |c' - cc|^2 in float16
    for start in range(0, half_row, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mu = tl.load(centre + g * D + ds, mask=ds < D, other=0.0).to(tl.float64)
        c = (_load_codes(base, ks, ds, stride_k, stride_d, K, D) * length[:, None] - mu[None, :]) * scale
        c = tl.where(screened[:, None], c, 0.0)
        where = (g * padded + ks[:, None]) * half_row + ds[None, :]
        inside = (ks < padded)[:, None] & (ds < half_row)[None, :]
        tl.store(single + where, c.to(tl.float32), mask=inside)
        if HALF:
            rounded = tl.where(tl.abs(c) < HALF_MAX, c, 0.0).to(tl.float32).to(tl.float16)
            tl.store(half + where, rounded, mask=inside)
            rest = c - rounded.to(tl.float64)
            rest2 += tl.sum(rest * rest, 1)

    norm = tl.where(screened, tl.sqrt(tl.where(screened, inner2, 0.0)), 0.0)
    rest = tl.where(screened, tl.sqrt(rest2), 0.0)
    h = norm * norm * 0.5 if METRIC == L2 else norm * 0.0
    # h is rounded to float32, and R h - X w - z.c takes four float32 roundings, of which those of z.c and X w are in w: 2^-20 is
    # ample. For l2 it also covers the contract's own rounding of |c'|^2 in float64.
    extra = tl.where(screened, h * 2.0**-20, float("inf"))
    h = tl.where(screened, h - extra, FAR if METRIC == L2 else -FAR)
    h = tl.where(finite, h, DROPPED)
    # dot and cosine: the contract's own rounding, relative to |x||c| as given.
    own = 0.0 * norm
    if METRIC == DOT:
        own = tl.where(screened, evaluate * tl.sqrt(tl.where(screened, norm2, 0.0)) * scale, 0.0)
    elif METRIC == COSINE:
        own = tl.where(screened, evaluate, own)
    wide = (rest + (HALF_STEP + half_accumulate) * (norm + rest) + own) * (1.0 + 2.0**-16)
    at = g * padded + ks
    inside = ks < padded
    tl.store(offset + at, h.to(tl.float32), mask=inside)
    tl.store(slack + at, extra.to(tl.float32), mask=inside)
    tl.store(width_half + at, wide.to(tl.float32), mask=inside)
    tl.store(width_single + at, ((single_step * norm + own) * (1.0 + 2.0**-16)).to(tl.float32), mask=inside)
    mixed = mixed * 1640531527
    mixed = ((mixed ^ (mixed >> 13)) * 73244475) & (table_size - 1)
    tl.store(hashes + at, mixed, mask=inside)
    tl.atomic_min(table + g * table_size + mixed, ks.to(tl.int32), mask=finite)


@triton.jit
def _duplicates_kernel(
    codebook, stride_g, stride_k, stride_d, K, D,
    offset, slack, hashes, table, table_size, padded,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Drop every code that equals a lower one: it can never be chosen, and many equal codes would leave no row certified."""
    g = tl.program_id(1).to(tl.int64)
    ks = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = g * padded + ks
    first = tl.load(table + g * table_size + tl.load(hashes + at, mask=ks < K, other=0), mask=ks < K, other=0).to(tl.int64)
    same = (ks < K) & (first < ks)
    base = codebook + g * stride_g
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = same[:, None] & (ds < D)[None, :]
        c = tl.load(base + ks[:, None] * stride_k + ds[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(base + first[:, None] * stride_k + ds[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        same = same & (tl.sum((c != other).to(tl.int32), 1) == 0)
    tl.store(offset + at, tl.full([BLOCK], DROPPED, tl.float32), mask=same)
    tl.store(slack + at, tl.full([BLOCK], float("inf"), tl.float32), mask=same)


@triton.jit
def _load_raw(pointers, valid, ds, stride_d, D):
    """[BLOCK_N, BLOCK_D] float32 components of the rows, 0 outside."""
    inside = valid[:, None] & (ds < D)[None, :]
    return tl.load(pointers[:, None] + ds[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _shift(raw, ds, D, centre, unit, METRIC: tl.constexpr):
    """x -> x' (l2: centred and scaled; otherwise x), 0 in the padding of D."""
    if METRIC == L2:
        mu = tl.load(centre + ds, mask=ds < D, other=0.0)[None, :]
        raw = tl.where((ds < D)[None, :], (raw - mu) * unit, 0.0)
    return raw


@triton.jit
def _row_scale(largest, METRIC: tl.constexpr):
    """[BLOCK_N] max |x'_d| -> 1 / p with p the power of two in (largest / 2, largest], in the range that the screen can take."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    low: tl.constexpr = ROW_MIN if METRIC == L2 else 2.0**-100
    power = tl.minimum(tl.maximum(power, low), 2.0**126)
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_b", "stride_g", "N", "first", "rows"], do_not_specialize_on_alignment=["stride_d"])
def _rows_kernel(
    x, stride_b, stride_g, stride_n, stride_d, N, D, first, rows, chosen, ready,
    centre, unit,
    half, row_width, row_scale, half_row, accumulate,
    METRIC: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Round BLOCK rows of one group to float16: reads x twice (the second time from cache), writes 2 P bytes a row.

    Row r of this launch is row first + r of the group's B * N. row_width = X, inf for a row that no screen takes (too large), NaN for
    one that is not finite. LISTED: row r is row first + chosen[g, r], and there are ready[g] of them.
    """
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = r < rows
    place = r
    if LISTED:
        count = tl.load(ready + g)
        if tl.program_id(0).to(tl.int64) * BLOCK >= count:
            return
        valid = r < count
        place = tl.load(chosen + g * rows + r, mask=valid, other=0).to(tl.int64)
    b = (first + place) // N
    pointers = _row_pointers(x, stride_b, stride_g, stride_n, b, g, first + place - b * N, ALIGN)
    scale = tl.load(unit + g) if METRIC == L2 else 1.0
    mu = centre + g * D
    largest = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        raw = _load_raw(pointers, valid, ds, stride_d, D)
        bad += tl.sum((~(tl.abs(raw) < float("inf"))).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.abs(_shift(raw, ds, D, mu, scale, METRIC)), 1))
    far = ~(largest <= ROW_MAX) if METRIC == L2 else ~(largest < float("inf"))
    skip = far | (bad > 0)
    usable = valid & ~skip
    scaled = _row_scale(tl.where(usable, largest, 1.0), METRIC)
    norm2 = tl.zeros([BLOCK], tl.float32)
    rest2 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, half_row, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        z = _shift(_load_raw(pointers, usable, ds, stride_d, D), ds, D, mu, scale, METRIC) * scaled[:, None]
        z = tl.where(usable[:, None], z, 0.0)
        rounded = z.to(tl.float16)
        where = (g * rows + r[:, None]) * half_row + ds[None, :]
        tl.store(half + where, rounded, mask=valid[:, None] & (ds < half_row)[None, :])
        rest = z - rounded.to(tl.float32)  # exact
        norm2 += tl.sum(z * z, 1)
        rest2 += tl.sum(rest * rest, 1)
    # (1 + accumulate) is above the rounding of the two sums of D squares, 2^-10 above |zz| <= |z| + |z - zz| and the two roots;
    # 2^-23 stands for the two roundings of z itself, 2^-50 for squares that underflow (sqrt(D 2^-126)).
    norm = tl.sqrt(norm2)
    error = tl.sqrt(rest2) + (2.0**-23 + accumulate) * norm
    width = tl.maximum(norm, error / (HALF_STEP + accumulate)) * (1.0 + 2.0**-10 + accumulate) + 2.0**-50
    width = tl.where(bad > 0, float("nan"), tl.where(far, float("inf"), width))
    tl.store(row_width + g * rows + r, width, mask=valid)
    tl.store(row_scale + g * rows + r, scaled if METRIC == L2 else tl.full([BLOCK], 1.0, tl.float32), mask=valid)

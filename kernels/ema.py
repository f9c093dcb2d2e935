"""Code statistics and the moving-average update on Triton; deterministic, without float atomics.

    indices --keys--> [g, k] of each row --sort (stable)--> rows grouped by code, ascending
    each code's rows are cut into blocks of 512; one program sums one block; codes of several blocks add them up in order

Every sum is a fixed tree over fixed blocks, in float64, so it depends on the rows and their codes alone. A code that owns half of all
rows has many blocks, which run side by side like any others: no program ever owns more than 512 rows.
Bytes: x is read once, 4 D a row for float32 (rows of more than 256 components: once per 256), the keys a few times, 8 D per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._rows import _row_pointers, row_alignment
from ._triton import cdiv, group_parts, on_device


@triton.jit(do_not_specialize=["rows", "groups", "per_group"])
def _keys_kernel(indices, keys, rows, groups, per_group, K, BLOCK: tl.constexpr):
    """keys[r] = g (K + 1) + code, with code K for every row that is left out."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + r, mask=r < rows, other=-1)
    code = tl.where((index >= 0) & (index < K), index, K)
    key = (r // per_group) % groups * (K + 1) + code
    tl.store(keys + r, key.to(keys.dtype.element_ty), mask=r < rows)


@triton.jit(do_not_specialize=["stride_b", "stride_g", "groups", "per_group"], do_not_specialize_on_alignment=["stride_d"])
def _block_sums_kernel(
    x, stride_b, stride_g, stride_n, stride_d, D, groups, per_group,
    rows_by_code, starts, first_block, block_key, K,
    sums, counts, partial, dropped,
    CHECK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (p, c): the sum over block p, at most BLOCK rows of one code, of components c BLOCK_D..; a block of its own finishes the code."""
    p = tl.program_id(0).to(tl.int64)
    key = tl.load(block_key + p)
    blocks = tl.load(first_block + key + 1) - tl.load(first_block + key)
    if blocks > 0:  # programs beyond the last block carry the key of a code without any
        begin = tl.load(starts + key) + (p - tl.load(first_block + key)) * BLOCK
        end = tl.minimum(begin + BLOCK, tl.load(starts + key + 1))
        ds = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float64)
        lost = 0
        for start in range(begin, end, ROWS):
            at = start + tl.arange(0, ROWS).to(tl.int64)
            row = tl.load(rows_by_code + at, mask=at < end, other=0)
            bg = row // per_group
            pointers = _row_pointers(x, stride_b, stride_g, stride_n, bg // groups, bg % groups, row % per_group, ALIGN)
            keep = at < end
            value = tl.load(
                pointers[:, None] + ds[None, :] * stride_d, mask=keep[:, None] & (ds < D)[None, :], other=0.0
            ).to(tl.float32)
            if CHECK:
                bad = tl.sum((~(tl.abs(value) < float("inf"))).to(tl.int32), 1)
                if D > BLOCK_D:  # the row's other components decide too
                    for other in range(0, D, BLOCK_D):
                        es = other + tl.arange(0, BLOCK_D).to(tl.int64)
                        rest = tl.load(
                            pointers[:, None] + es[None, :] * stride_d, mask=keep[:, None] & (es < D)[None, :], other=0.0
                        ).to(tl.float32)
                        bad += tl.sum((~(tl.abs(rest) < float("inf"))).to(tl.int32), 1)
                lost += tl.sum((keep & (bad > 0)).to(tl.int32), 0)
                value = tl.where((bad > 0)[:, None], 0.0, value)
            total += tl.sum(value.to(tl.float64), 0)
        code = key // (K + 1) * K + key % (K + 1)
        lost_here = tl.full([1], 0, tl.int64) + lost
        one = tl.arange(0, 1)
        if blocks == 1:
            tl.store(sums + code * D + ds, total.to(tl.float32), mask=ds < D)
            tl.store(counts + code + one, end - begin - lost_here)
        else:
            tl.store(partial + p * D + ds, total, mask=ds < D)
            tl.store(dropped + p + one, lost_here)


@triton.jit
def _code_sums_kernel(
    D, starts, first_block, K, all_codes, sums, counts, partial, dropped,
    CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (p, c): the ordered sums of the blocks of those among CODES codes that have several; most programs find none."""
    begin = tl.program_id(0).to(tl.int64) * CODES
    code = begin + tl.arange(0, CODES)
    key = code // K * (K + 1) + code % K
    known = code < all_codes
    blocks = tl.load(first_block + key + 1, mask=known, other=0) - tl.load(first_block + key, mask=known, other=0)
    if tl.max(blocks, 0) > 1:
        ds = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        for one in range(begin, tl.minimum(begin + CODES, all_codes)):
            at_key = one // K * (K + 1) + one % K
            first = tl.load(first_block + at_key)
            last = tl.load(first_block + at_key + 1)
            if last - first > 1:
                total = tl.zeros([BLOCK_D], tl.float64)
                lost = tl.zeros([ROWS], tl.int64)
                for start in range(first, last, ROWS):
                    at = start + tl.arange(0, ROWS).to(tl.int64)
                    some = (at < last)[:, None] & (ds < D)[None, :]
                    total += tl.sum(tl.load(partial + at[:, None] * D + ds[None, :], mask=some, other=0.0), 0)
                    lost += tl.load(dropped + at, mask=at < last, other=0)
                tl.store(sums + one * D + ds, total.to(tl.float32), mask=ds < D)
                tl.store(counts + one, tl.load(starts + at_key + 1) - tl.load(starts + at_key) - tl.sum(lost, 0))


def rows_by_code(indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """indices [B, G, N] -> (flat rows grouped by (group, code), ascending; start of each of the G (K + 1) + 1 groups), both int64.

    The last code of each group, K, holds the rows that are left out.
    """
    g, n = indices.shape[1:]
    last = g * (codebook_size + 1)
    # The sort's cost goes with the bytes of its keys.
    dtype = torch.int16 if last < 2**15 else torch.int32 if last < 2**31 else torch.int64
    keys = torch.empty(indices.numel(), dtype=dtype, device=indices.device)
    tile = _tuning.KEYS
    _keys_kernel[(cdiv(keys.numel(), tile["BLOCK"]),)](indices.contiguous(), keys, keys.numel(), g, n, codebook_size, **tile)
    keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(last + 1, dtype=dtype, device=keys.device))
    return order, starts


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """[B, G, N] -> [G, K] int64: how often each code stands there."""
    g = indices.shape[1]
    if not indices.numel():
        return torch.zeros((g, codebook_size), dtype=torch.int64, device=indices.device)
    with on_device(indices):
        _, starts = rows_by_code(indices, codebook_size)
    return starts.diff().view(g, codebook_size + 1)[:, :-1].contiguous()


def code_stats_triton(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """x [B, G, N, D], indices [B, G, N] -> sums [G, K, D] float32, counts [G, K] int64; -1 and rows that are not finite are left out."""
    return code_sums(x, indices, codebook_size, check=True)


def code_sums(x: Tensor, indices: Tensor, codebook_size: int, check: bool) -> tuple[Tensor, Tensor]:
    """`check` says that a row may hold NaN or Inf."""
    g, n, d = x.shape[1:]
    k = codebook_size
    sums = torch.zeros((g, k, d), dtype=torch.float32, device=x.device)
    counts = torch.zeros((g, k), dtype=torch.int64, device=x.device)
    if not indices.numel():
        return sums, counts
    tile = _tuning.sums(d)
    chunks = cdiv(d, tile["BLOCK_D"])
    with on_device(x):
        order, starts = rows_by_code(indices, k)
        blocks = (starts.diff() + tile["BLOCK"] - 1) // tile["BLOCK"]
        blocks.view(g, k + 1)[:, k] = 0
        first_block = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
        # As many programs as there can be blocks: how many there are is known to the device only.
        most = indices.numel() // tile["BLOCK"] + min(g * k, indices.numel())
        block_key = torch.searchsorted(first_block[1:], torch.arange(most, device=x.device), right=True)
        # Programs without a block take the last group's left-out rows, which have none.
        block_key = block_key.clamp(max=g * (k + 1) - 1)
        partial = torch.empty((most, d), dtype=torch.float64, device=x.device)
        dropped = torch.empty(most, dtype=torch.int64, device=x.device)
        _block_sums_kernel[(most, chunks)](
            x, *x.stride(), d, g, n, order, starts, first_block, block_key, k, sums, counts, partial, dropped, CHECK=check,
            ALIGN=row_alignment(x), **tile,
        )  # fmt: skip
        _code_sums_kernel[(cdiv(g * k, _tuning.CODES), chunks)](
            d, starts, first_block, k, g * k, sums, counts, partial, dropped, CODES=_tuning.CODES, ROWS=tile["ROWS"],
            BLOCK_D=tile["BLOCK_D"],
        )  # fmt: skip
    return sums, counts


@triton.jit
def _update_kernel(
    codebook, cluster_size, cluster_sum, sums, counts, frozen, any_row, K, D, decay, gain, eps,
    FROZEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK codes of one group; every product and sum rounded as torch rounds them, so that the result is the reference's to the bit."""
    g = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    at = g * K + k
    has_row = tl.load(any_row + g) > 0
    keep = tl.where(has_row, decay, 1.0)
    take = tl.where(has_row, gain, 0.0)
    size = tl.load(cluster_size + at, mask=inside, other=1.0) * keep
    size = size + tl.load(counts + at, mask=inside, other=0).to(tl.float32) * take
    moves = inside & has_row & (size >= eps)
    if FROZEN:
        moves = moves & (tl.load(frozen + at, mask=inside, other=1) == 0)
    divisor = tl.maximum(size, eps)
    counts_in = inside  # a sum that overflows keeps all of the code's state
    for start in range(0, D, BLOCK_D):  # a mean that overflows keeps the whole code
        ds = start + tl.arange(0, BLOCK_D)
        some = inside[:, None] & (ds < D)[None, :]
        where = at[:, None] * D + ds[None, :]
        total = tl.load(cluster_sum + where, mask=some, other=0.0) * keep
        total = total + tl.load(sums + where, mask=some, other=0.0) * take
        mean = tl.math.div_rn(total, tl.broadcast_to(divisor[:, None], [BLOCK, BLOCK_D]))
        moves = moves & (tl.sum((~(tl.abs(mean) < float("inf"))).to(tl.int32), 1) == 0)
        counts_in = counts_in & (tl.sum((~(tl.abs(total) < float("inf"))).to(tl.int32), 1) == 0)
    tl.store(cluster_size + at, size, mask=counts_in)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)
        some = inside[:, None] & (ds < D)[None, :]
        where = at[:, None] * D + ds[None, :]
        total = tl.load(cluster_sum + where, mask=some, other=0.0) * keep
        total = total + tl.load(sums + where, mask=some, other=0.0) * take
        mean = tl.math.div_rn(total, tl.broadcast_to(divisor[:, None], [BLOCK, BLOCK_D]))
        tl.store(cluster_sum + where, total, mask=some & counts_in[:, None])
        tl.store(codebook + where, mean, mask=some & moves[:, None])


def ema_update_triton_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, sums: Tensor, counts: Tensor, frozen: Tensor | None,
    decay: float, eps: float,
) -> None:  # fmt: skip
    """Move sizes and sums towards this step's and the codebook to their ratio, in place; contiguous float32 state [G, K(, D)]."""
    g, k, d = codebook.shape
    if len(parts := group_parts(g)) > 1:
        for part in parts:
            state = (tensor[part] for tensor in (codebook, cluster_size, cluster_sum, sums, counts))
            ema_update_triton_(*state, None if frozen is None else frozen[part], decay, eps)
        return
    any_row = (counts.sum(-1) > 0).to(torch.int32)
    frozen_bytes = counts if frozen is None else frozen.contiguous().view(torch.uint8)
    with on_device(codebook):
        _update_kernel[(cdiv(k, _tuning.UPDATE["BLOCK"]), g)](
            codebook, cluster_size, cluster_sum, sums.contiguous(), counts.contiguous(), frozen_bytes, any_row, k, d, decay, 1.0 - decay, eps,
            FROZEN=frozen is not None, **_tuning.UPDATE, enable_fp_fusion=False,
        )  # fmt: skip

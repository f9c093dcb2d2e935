"""Replacement of dead codes by rows of the batch: fixed shapes, no host sync, the same decision on every process."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants of the splitmix64 generator (Steele et al. 2014), as signed integers.
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _hash(value: Tensor) -> Tensor:
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * _MIX1
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def candidates(rows: Tensor, indices: Tensor, quantized: Tensor, step: Tensor, slots: int) -> Tensor:
    """Up to `slots` rows per group that count: rows [B, G, N, D] -> a pool [G, slots, D + 1]; the rest as in `pick`."""
    if min(slots, rows.shape[0] * rows.shape[2]) == 0:
        return rows.new_zeros(rows.shape[1], 0, rows.shape[3] + 1, dtype=torch.float32)
    picked, real = pick(indices, quantized, step, slots)
    return pool_of(at(rows, picked), real)


def pick(indices: Tensor, quantized: Tensor, step: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Choose up to `slots` rows per group by a hash of (step, position).

    indices [B, G, N] (-1 = masked), quantized [B, G, N, D] (NaN = not finite), step [] int64 -> their numbers among the B * N of a group,
    [G, slots], those that count first, and whether they do.
    """
    batches, groups, per_batch = indices.shape
    count = batches * per_batch
    valid = ((indices >= 0) & ~quantized[..., 0].isnan()).transpose(0, 1).reshape(groups, count)
    position = torch.arange(count, device=indices.device)
    order = _hash((position + step * count + 1) * _GOLDEN) >> 1
    order = torch.where(valid, order, torch.iinfo(torch.int64).max)
    picked = order.topk(min(slots, count), dim=-1, largest=False).indices
    return picked, valid.gather(1, picked)


def at(rows: Tensor, picked: Tensor) -> Tensor:
    """Rows [B, G, N, ...] of the numbers that `pick` gave, [G, slots, ...]."""
    group = torch.arange(rows.shape[1], device=rows.device)[:, None]
    return rows[picked // rows.shape[2], group, picked % rows.shape[2]]


def pool_of(rows: Tensor, real: Tensor) -> Tensor:
    """rows [G, slots, D], real [G, slots] -> [G, slots, D + 1] float32; the last column is 1 for a real row."""
    rows = rows.to(torch.float32)
    real = (real & rows.isfinite().all(-1))[..., None]  # a rest of finite rows may have overflowed
    return torch.cat((torch.where(real, rows, 0), real.to(torch.float32)), -1)


def replace_dead_(codebook: Tensor, dead: Tensor, pool: Tensor) -> Tensor:
    """Give the first dead codes of each group the candidates of the pool, in place.

    codebook [G, K, D], dead [G, K] bool, pool [G, R, D + 1] -> replaced [G, K] bool.
    """
    if pool.shape[1] == 0:
        return torch.zeros_like(dead)
    real = pool[..., -1] > 0
    order = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # real candidates first
    turn = dead.cumsum(-1) - 1
    replaced = dead & (turn < real.sum(-1, keepdim=True))
    slot = order.gather(1, turn.clamp(0, pool.shape[1] - 1))
    fresh = pool[..., :-1].gather(1, slot[..., None].expand(-1, -1, codebook.shape[-1]))
    codebook.copy_(torch.where(replaced[..., None], fresh.to(codebook.dtype), codebook))
    return replaced

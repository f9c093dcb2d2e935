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
    """Pick up to `slots` valid rows per group, by a hash of (step, position).

    rows [B, G, N, D], indices [B, G, N] (-1 = masked), quantized [B, G, N, D] (NaN = not finite), step [] int64 -> [G, slots, D + 1]; the
    last column is 1 for a real row.
    """
    batches, groups, per_batch, dim = rows.shape
    count = batches * per_batch
    slots = min(slots, count)
    if slots == 0:
        return rows.new_zeros(groups, 0, dim + 1, dtype=torch.float32)
    valid = ((indices >= 0) & ~quantized[..., 0].isnan()).transpose(0, 1).reshape(groups, count)
    position = torch.arange(count, device=rows.device)
    order = _hash((position + step * count + 1) * _GOLDEN) >> 1
    order = torch.where(valid, order, torch.iinfo(torch.int64).max)
    picked = order.topk(slots, dim=-1, largest=False).indices  # [G, slots]
    group = torch.arange(groups, device=rows.device)[:, None]
    chosen = rows[picked // per_batch, group, picked % per_batch].to(torch.float32)
    # A rest of rows that are finite may have overflowed.
    real = valid.gather(1, picked) & chosen.isfinite().all(-1)
    return torch.cat((torch.where(real[..., None], chosen, 0), real[..., None].to(torch.float32)), -1)


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

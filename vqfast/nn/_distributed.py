"""The one collective of a training step: sums, exact counts and revival candidates of all levels in one packed all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# A count is carried as two float columns, n // 4096 and n % 4096, so that float32 sums of them stay exact.
_SPLIT = 4096


def world(group) -> tuple[int, int]:
    """(rank, size) of `group`, or of the default group at call time; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_reduce_stats(sums: Tensor, counts: Tensor, candidates: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the statistics over all processes.

    Args:
        sums: [S, K, D] float, S = groups or levels times groups; D may be 0.
        counts: [S, K] int64.
        candidates: [S, R, D + 1] this process's rows and a validity column; R may be 0.
        group: process group, or None for the default one.

    Returns:
        (sums, counts, candidates [S, R * size, D + 1]); unchanged without torch.distributed. Every process gets the same bits.
    """
    rank, size = world(group)
    if size == 1:
        return sums, counts, candidates
    slots = candidates.new_zeros(*candidates.shape[:2], size, candidates.shape[-1])
    slots[:, :, rank] = candidates
    columns = torch.stack((counts // _SPLIT, counts % _SPLIT))
    parts = (sums, columns.to(sums.dtype), slots.to(sums.dtype))
    packed = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(packed, group=group)
    sums, columns, slots = (
        part.view(like.shape) for part, like in zip(packed.split([p.numel() for p in parts]), parts, strict=True)
    )
    columns = columns.to(torch.int64)
    return sums, columns[0] * _SPLIT + columns[1], slots.to(candidates.dtype).flatten(1, 2)


def all_gather_rows(rows: Tensor, group) -> Tensor:
    """Rows [N, D] of all processes, in rank order; N may differ between them."""
    _, size = world(group)
    if size == 1:
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[: int(c)] for part, c in zip(gathered, counts, strict=True)])

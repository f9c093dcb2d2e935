"""What the faces of other libraries' quantizers are made of: the exact search, their straight-through, errors and averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vqfast.nn._distributed import world
from vqfast.ops.ema import code_stats
from vqfast.ops.nearest import nearest


def lookup(rows: Tensor, codes: Tensor, metric: str = "l2") -> Tensor:
    """Index [...] of the nearest of codes [K, D] to each of rows [..., D]; int64, carries no gradient, never N x K."""
    return nearest(rows.detach(), codes.detach(), metric=metric).indices


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """codes, up to the rounding of z + (codes - z), with the identity as the gradient into z."""
    return z + (codes - z).detach()


def mean_errors(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error twice: with its gradient into z, and into the codes."""
    return torch.mean((codes.detach() - z) ** 2), torch.mean((codes - z.detach()) ** 2)


def image_rows(z: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], contiguous."""
    return z.permute(0, 2, 3, 1).contiguous()


def image(rows: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], contiguous."""
    return rows.permute(0, 3, 1, 2).contiguous()


# ---- moving averages -------------------------------------------------------------------------------------------------------


def counts_and_sums(rows: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many of rows [N, D] chose each code, [K], and their sums, [K, D]; rows' dtype, no one-hot matrix."""
    sums, counts = code_stats(rows.detach(), indices, codebook_size)
    return counts.to(rows.dtype), sums.to(rows.dtype)


def sum_over_processes_(*tensors: Tensor) -> None:
    """All-reduce in place where several processes train."""
    if world(None)[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_(*tensors: Tensor) -> None:
    """Copy the first process's values to all, in place, where several train."""
    if world(None)[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def blend_(average: Tensor, new: Tensor, decay: float) -> None:
    """average <- decay average + (1 - decay) new."""
    average.data.mul_(decay).add_(new, alpha=1 - decay)


def smoothed(sizes: Tensor, eps: float) -> Tensor:
    """Laplace smoothing of cluster sizes [K] that keeps their total."""
    total = sizes.sum()
    return (sizes + eps) / (total + sizes.numel() * eps) * total


def sample_rows(rows: Tensor, count: int) -> Tensor:
    """`count` of rows [N, D], drawn without replacement where there are as many; the draws that the peers make."""
    n = rows.shape[0]
    picked = torch.randperm(n, device=rows.device)[:count] if n >= count else torch.randint(0, n, (count,), device=rows.device)
    return rows[picked]


def lloyd(rows: Tensor, codebook_size: int, iterations: int) -> tuple[Tensor, Tensor]:
    """k-means as EnCodec starts its codebooks: drawn rows, then Lloyd steps in which an empty code keeps its place.

    Returns (codes [K, D], counts [K]), memory O(N D + K D).
    """
    codes, counts = sample_rows(rows, codebook_size), rows.new_zeros(codebook_size)
    for _ in range(iterations):
        counts, sums = counts_and_sums(rows, lookup(rows, codes), codebook_size)
        codes = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], codes)
    return codes, counts

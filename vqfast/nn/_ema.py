"""The two moving-average rules by which a codebook follows its statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops.ema import ema_update_


def plain_(codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, step: Tensor, sums, counts, frozen, decay, eps) -> None:
    """Sizes start at 1 and sums at the codebook; a code whose size falls under eps keeps its value."""
    ema_update_(codebook, cluster_size, cluster_sum, sums, counts, decay=decay, eps=eps, frozen=frozen)


def debiased_(codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, step: Tensor, sums, counts, frozen, decay, eps) -> None:
    """Sonnet's rule: both averages start at 0 and are divided by 1 - decay^t; sizes are Laplace-smoothed with eps.

    Source: Sonnet's VectorQuantizerEMA. A code that no row ever chose goes to zero under this rule.
    """
    any_row = (counts.sum(-1) > 0)[..., None]  # [S, 1]; a step without rows changes nothing
    keep = torch.where(any_row, torch.tensor(decay, dtype=torch.float64, device=counts.device), 1.0)
    keep, take = keep.to(cluster_size.dtype), (1.0 - keep).to(cluster_size.dtype)
    total = cluster_sum * keep[..., None] + sums.to(cluster_sum.dtype) * take[..., None]
    counts_in = total.isfinite().all(-1)  # as in ema_update_
    cluster_size.copy_(torch.where(counts_in, cluster_size * keep + counts.to(cluster_size.dtype) * take, cluster_size))
    cluster_sum.copy_(torch.where(counts_in[..., None], total, cluster_sum))
    bias = 1 - torch.as_tensor(decay, dtype=torch.float64, device=step.device) ** step.to(torch.float64)
    bias = bias.clamp(min=torch.finfo(torch.float64).tiny).to(cluster_size.dtype)
    size = cluster_size / bias
    total = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (total + codebook.shape[-2] * eps) * total
    mean = (cluster_sum / bias) / smoothed[..., None]
    moves = (any_row & counts_in)[..., None] & mean.isfinite().all(-1, keepdim=True)
    if frozen is not None:
        moves = moves & ~frozen[..., None]
    codebook.copy_(torch.where(moves, mean, codebook))


RULES = {"ema": plain_, "debiased": debiased_}

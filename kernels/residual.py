"""residual on Triton: per level one search, then one pass that subtracts the code, adds it to the result and takes the statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import _step


def residual_triton(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, metric: int, with_sums: bool, with_pull: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, G, N, D], codebooks [Q, G, K, D] -> quantized, sq_error [2] of all levels together, indices [Q, B, G, N], sums, counts [Q, ...],
    nonfinite, and the pull [B, G, N, D] (empty unless asked for): the sum over levels of what each left over, 0 where a row does not count.

    The rest of a row is float32 at every level.
    """
    rest = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    pull = torch.zeros_like(rest) if with_pull else rest.new_empty(0)
    levels = []
    for level, codebook in enumerate(codebooks):
        rows = x if level == 0 else rest
        # A level's statistics read its own rows, so the next rest goes elsewhere.
        following = torch.empty_like(rest) if level else rest
        levels.append(_step(rows, codebook, mask, metric, with_sums, rest=following, total=total, level=level))
        rest = following
        if with_pull:
            valid = (levels[-1][1] >= 0)[..., None] & ~rest[..., :1].isnan()  # rows that are not finite have no code
            pull += torch.where(valid, rest, 0)
    sq_error, indices, sums, counts, nonfinite = zip(*levels)
    sums = torch.stack(sums) if with_sums else sums[0]
    quantized = total.to(x.dtype) if x.is_contiguous() else torch.empty_like(x).copy_(total)  # in the layout of x
    return quantized, torch.stack(sq_error).sum(0), torch.stack(indices), sums, torch.stack(counts), nonfinite[0], pull

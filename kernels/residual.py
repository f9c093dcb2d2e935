"""residual on Triton: per level one search, then one pass that subtracts the code, adds it to the result and takes the statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import gather_triton
from .quantize import _step


def residual_triton(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, metric: int, with_sums: bool, with_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, G, N, D], codebooks [Q, G, K, D] -> as quantize, each output but the first and last with a leading Q.

    The rest of a row is float32 at every level.
    """
    rest = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    levels = []
    for level, codebook in enumerate(codebooks):
        rows = x if level == 0 else rest
        # A level's statistics read its own rows, so the next rest goes elsewhere.
        following = torch.empty_like(rest) if level else rest
        levels.append(_step(rows, codebook, mask, metric, with_sums, rest=following, total=total, level=level))
        rest = following
    sq_error, indices, sums, counts, nonfinite = zip(*levels)
    sums = torch.stack(sums) if with_sums else sums[0]
    rows = codebooks.new_empty(0)
    if with_rows:
        rows = torch.stack([gather_triton(codebook, chosen) for codebook, chosen in zip(codebooks, indices)])
    return total.to(x.dtype), torch.stack(sq_error), torch.stack(indices), sums, torch.stack(counts), nonfinite[0], rows

"""gather on Triton: one coalesced read of each code (from L2) and one write of each row; its gradient is code_stats (ema.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._triton import cdiv, on_device


@triton.jit(do_not_specialize=["rows", "groups", "per_group"])
def _gather_kernel(
    codebook, stride_g, stride_k, stride_d, K, D,
    indices, out, rows, groups, per_group,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[r] = codebook[g(r), indices[r]] for BLOCK_N of the B * G * N rows; zeros for an index outside 0..K-1, which reads nothing."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.load(indices + r, mask=r < rows, other=-1)
    inside = (index >= 0) & (index < K)
    code = codebook + (r // per_group) % groups * stride_g + tl.where(inside, index, 0) * stride_k
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D).to(tl.int64)
        some = (ds < D)[None, :]
        value = tl.load(code[:, None] + ds[None, :] * stride_d, mask=inside[:, None] & some, other=0.0)
        tl.store(out + r[:, None] * D + ds[None, :], value, mask=(r < rows)[:, None] & some)


def gather_triton(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook [G, K, D], indices [B, G, N] int64 -> [B, G, N, D] contiguous; zeros for an index outside 0..K-1."""
    _, k, d = codebook.shape
    out = torch.empty((*indices.shape, d), dtype=codebook.dtype, device=codebook.device)
    rows, tile = indices.numel(), _tuning.step(d)
    if rows:
        with on_device(codebook):
            _gather_kernel[(cdiv(rows, tile["BLOCK_N"]),)](
                codebook, *codebook.stride(), k, d, indices.contiguous(), out, rows, indices.shape[1], indices.shape[2], **tile
            )
    return out

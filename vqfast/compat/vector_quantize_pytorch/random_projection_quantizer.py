"""`RandomProjectionQuantizer` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch._helpers import exists  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Targets for self-supervised speech (BEST-RQ): indices of randomly projected rows in random codebooks.

    State dict: `rand_projs` [num_codebooks, dim, codebook_dim], `vq.*`. With several codebooks the inner layer keeps the other
    library's shapes, and with them its checkpoints: codes of num_codebooks * codebook_dim channels behind a projection.

    Source: Chiu et al. 2022 (arXiv 2202.01855), section 3.
    """

    def __init__(
        self, *, dim: int, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, norm: bool = True, **kwargs
    ):
        super().__init__()
        self.num_codebooks = num_codebooks
        projections = torch.empty(num_codebooks, dim, codebook_dim)
        nn.init.xavier_normal_(projections)
        self.register_buffer("rand_projs", projections)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            dim=codebook_dim * num_codebooks,
            heads=num_codebooks,
            codebook_size=codebook_size,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            **kwargs,
        )

    def explain(self) -> str:
        """Say in words what runs this layer's search."""
        return self.vq.explain()

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """x [B, N, dim] -> indices [B, N, num_codebooks] ([B, N] for one); with target indices their cross entropy, []."""
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(-2)
        self.vq.eval()  # its codebook never learns
        out = self.vq(projected, indices=indices)
        return out[1]

"""`SimVQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqfast import _backends
from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._gradients import rotate_to, straight_through
from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    default,
    exists,
    identity,
)
from vqfast.compat.vector_quantize_pytorch._helpers import pack_with_inverse as pack_one  # noqa: F401
from vqfast.ops import quantize
from vqfast.ops.gather import gather


def _identity(t: Tensor) -> Tensor:
    return t


class SimVQ(nn.Module):
    """Vector quantization whose codebook is a learned transform of frozen random codes.

    loss = commitment_weight * (mean (sg[x] - code)^2 + input_to_quantize_commit_loss_weight * mean (x - sg[code])^2)

    State dict: `frozen_codebook` [K, frozen_codebook_dim], `code_transform.*`. Source: Zhu et al. 2024 (arXiv 2411.02038).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _identity,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ):
        super().__init__()
        self.dim, self.codebook_size, self.channel_first = dim, codebook_size, channel_first
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        codebook = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.code_transform = nn.Linear(frozen_dim, dim, bias=False) if codebook_transform is None else codebook_transform
        self.register_buffer("frozen_codebook", codebook)
        self.rotation_trick, self.commitment_weight = rotation_trick, commitment_weight
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight

    @property
    def codebook(self) -> Tensor:
        """The codes, [K, dim]; differentiable in the transform."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes of indices [B, ...] in the layer's layout; index -1 gives zeros."""
        codes = self.code_transform(gather(self.frozen_codebook, indices))
        codes = torch.where((indices >= 0)[..., None], codes, 0)
        return _layout.channels_back(codes, codes, self.channel_first)

    def explain(self) -> str:
        """Say in words what runs this layer's search."""
        return _backends.explain("quantize", self.frozen_codebook)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, ..., dim], or [B, dim, ...] with channel_first -> (quantized like x, indices [B, ...] int64, loss [])."""
        inner = _layout.channels_last(x, self.dim, channel_first=self.channel_first, spatial=None)
        rows = _layout.rows_of(inner, 1, False)
        step = quantize.step(rows, self.codebook[None])
        to_input, to_codes = step.sq_error / (step.counts.sum().clamp(min=1) * self.dim)
        loss = (to_codes + to_input * self.input_to_quantize_commit_loss_weight) * self.commitment_weight
        loss = loss.to(torch.promote_types(x.dtype, torch.float32))
        out = (rotate_to if self.rotation_trick else straight_through)(rows, step.quantized.detach())
        out = _layout.channels_back(out.reshape(inner.shape), x, self.channel_first)
        return out, step.indices.reshape(inner.shape[:-1]), loss

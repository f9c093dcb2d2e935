"""`ResidualLFQ` and `GroupedResidualLFQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    default,
    exists,
    is_distributed,
    round_up_multiple,
)
from vqfast.compat.vector_quantize_pytorch._residual import Grouped, Residual
from vqfast.compat.vector_quantize_pytorch._residual import sync_seed as get_maybe_sync_seed  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.finite_scalar_quantization import full_precision
from vqfast.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ


class ResidualLFQ(Residual):
    """LFQ layers whose scale halves from level to level, each on what the ones before left over.

    State dict: `layers.{q}.mask`, `project_in.*` and `project_out.*` with a projection.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs,
    ):
        super().__init__()
        self.num_quantizers, self.codebook_dim = num_quantizers, int(log2(codebook_size))
        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        clamp = soft_clamp_input_value
        self.layers = nn.ModuleList(
            LFQ(
                dim=self.codebook_dim,
                codebook_scale=2.0**-level,
                soft_clamp_input_value=None if clamp is None else clamp * 0.5**level,
                **kwargs,
            )
            for level in range(num_quantizers)
        )
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

    @property
    def codebooks(self) -> Tensor:
        """The codes of every level, [Q, K, D]."""
        return torch.stack([layer.codebook for layer in self.layers])

    def _decode_levels(self, indices: tuple[Tensor, ...]) -> list[Tensor]:
        codes = [layer._inner_codes(own) for layer, own in zip(self.layers, indices, strict=True)]
        return [torch.where((own >= 0)[..., None], code, 0) for own, code in zip(indices, codes, strict=True)]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ):
        """x [B, N, dim] -> (quantized like x, indices [B, N, Q], losses [Q]) and, if asked, codes [Q, B, N, D]."""
        rest, total = self.project_in(x), 0.0
        found, losses = [], []
        levels = self._levels(x.device, rand_quantize_dropout_fixed_seed, applies=torch.is_grad_enabled())
        with full_precision(x):
            for layer in self.layers[:levels]:
                quantized, own, loss = layer(rest, mask=mask)
                rest, total = rest - quantized.detach(), total + quantized
                found.append(own)
                losses.append(loss)
        indices, losses = self._stacked(found), self._stacked(losses, 0)
        result = (self.project_out(total), indices, losses)
        return (*result, self.get_codes_from_indices(indices)) if return_all_codes else result


class GroupedResidualLFQ(Grouped):
    """ResidualLFQ layers side by side, each on its share of the channels; state dict `rvqs.{g}.*`."""

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__(ResidualLFQ, dim, groups, accept_image_fmap, **kwargs)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False):
        """x [B, N, dim] -> (quantized like x, indices [G, B, N, Q], losses [G, Q]) and a tuple of G with codes."""
        quantized, (found, losses, *codes) = self._each(x, mask=mask, return_all_codes=return_all_codes)
        return (quantized, torch.stack(found), torch.stack(losses), *codes)

"""`ResidualFSQ` and `GroupedResidualFSQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    default,
    exists,
    first,
    is_distributed,
    round_up_multiple,
)
from vqfast.compat.vector_quantize_pytorch._residual import Grouped, Residual
from vqfast.compat.vector_quantize_pytorch._residual import sync_seed as get_maybe_sync_seed  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.finite_scalar_quantization import FSQ, full_precision


class ResidualFSQ(Residual):
    """FSQ layers with ever finer levels, each on what the ones before left over; state dict: projections only."""

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs,
    ):
        super().__init__()
        require(all(level > 1 for level in levels), f"every level must be at least 2, got {list(levels)}.")
        require(not bound_hard_clamp or soft_clamp_input_value is None, "bound_hard_clamp brings its own soft_clamp_input_value.")
        self.levels, self.num_quantizers, self.is_channel_first = levels, num_quantizers, is_channel_first
        self.codebook_dim = len(levels)
        self.dim = self.codebook_dim if dim is None else dim
        self.has_projections = self.dim != self.codebook_dim
        self.project_in = nn.Linear(self.dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, self.dim) if self.has_projections else nn.Identity()
        options = {"dim": self.codebook_dim, "preserve_symmetry": True, "bound_hard_clamp": bound_hard_clamp, **kwargs}
        self.layers = nn.ModuleList(FSQ(levels, **options) for _ in range(num_quantizers))
        self.codebook_size = self.layers[0].codebook_size
        sizes = torch.tensor(list(levels))
        scales = torch.stack([sizes.float() ** -level for level in range(num_quantizers)])
        self.register_buffer("scales", scales, persistent=False)
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        clamp = 1 + 1 / (sizes - 1) if bound_hard_clamp else soft_clamp_input_value
        clamp = torch.tensor(clamp) if isinstance(clamp, (float, list, tuple)) else clamp
        self.register_buffer("soft_clamp_input_value", clamp, persistent=False)

    @property
    def codebooks(self) -> Tensor:
        """The codes of every level before its scale, [Q, K, D]."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [Q, B, ..., D] of indices as forward returns them; zeros where -1."""
        return super().get_codes_from_indices(indices.movedim(1, -1) if self.is_channel_first else indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returned for these indices, in the layer's layout."""
        out = super().get_output_from_indices(indices)
        return out.movedim(-1, 1) if self.is_channel_first else out

    def _decode_levels(self, indices: tuple[Tensor, ...]) -> list[Tensor]:
        out = []
        for layer, scale, own in zip(self.layers, self.scales, indices, strict=True):
            codes = layer._indices_to_codes(own.clamp(min=0))
            codes = codes @ layer.orthogonal_rot.T if layer.orthogonal_rotation else codes
            out.append(torch.where((own >= 0)[..., None], codes * scale, 0))
        return out

    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None):
        """x [B, N, dim], or [B, dim, ...] with is_channel_first -> (quantized like x, indices), and codes if asked.

        indices are [B, N, Q], with is_channel_first [B, Q, ...]; -1 in levels that dropout left out.
        """
        inner = _layout.channels_last(x, self.dim, channel_first=self.is_channel_first, spatial=None)
        inner = self.project_in(inner)
        if self.soft_clamp_input_value is not None:
            inner = (inner / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        leading = inner.shape[:-1]
        rest, total, found = inner.flatten(1, -2) if inner.dim() > 2 else inner, 0.0, []
        levels = self._levels(x.device, rand_quantize_dropout_fixed_seed, applies=torch.is_grad_enabled())
        with full_precision(x):
            for layer, scale in zip(self.layers[:levels], self.scales, strict=False):
                quantized, own = layer(rest / scale)
                quantized = quantized * scale
                rest, total = rest - quantized.detach(), total + quantized
                found.append(own)
        out = self.project_out(total).unflatten(1, leading[1:]) if len(leading) > 1 else self.project_out(total)
        indices = self._stacked(found)
        indices = indices.unflatten(1, leading[1:]) if len(leading) > 1 else indices
        if self.is_channel_first:
            out, indices = out.movedim(-1, 1), indices.movedim(-1, 1)
        return (out, indices, self.get_codes_from_indices(indices)) if return_all_codes else (out, indices)


class GroupedResidualFSQ(Grouped):
    """ResidualFSQ layers side by side, each on its share of the channels; state dict `rvqs.{g}.*`."""

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        if accept_image_fmap:
            kwargs.setdefault("is_channel_first", True)
        super().__init__(ResidualFSQ, dim, groups, accept_image_fmap, **kwargs)
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False):
        """x [B, N, dim], or [B, dim, ...] with accept_image_fmap -> (quantized like x, indices [G, ...]) and a tuple of codes."""
        quantized, (found, *codes) = self._each(x, return_all_codes=return_all_codes)
        return (quantized, torch.stack(found), *codes)

"""`ResidualSimVQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

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
from vqfast.compat.vector_quantize_pytorch._helpers import pack_with_inverse as pack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._residual import Residual
from vqfast.compat.vector_quantize_pytorch._residual import sync_seed as get_maybe_sync_seed  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.sim_vq import SimVQ
from vqfast.ops.gather import gather


class ResidualSimVQ(Residual):
    """SimVQ layers that each quantize what the ones before left over; state dict `layers.{q}.*`.

    Every level passes the gradient on: d quantized / d x is num_quantizers times that of one level.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs,
    ):
        super().__init__()
        require(heads == 1, "ResidualSimVQ has one head.")
        self.num_quantizers, self.channel_first = num_quantizers, channel_first
        options = {"channel_first": channel_first, "rotation_trick": rotation_trick, **sim_vq_kwargs}
        self.layers = nn.ModuleList(SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers))
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)

    def project_out(self, t: Tensor) -> Tensor:
        """t; the other library has no projection here, and so no submodule for one."""
        return t

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebook_dim(self) -> int:
        return self.layers[0].dim

    @property
    def codebooks(self) -> Tensor:
        """The codes of every level, [Q, K, D]."""
        return torch.stack([layer.codebook for layer in self.layers])

    def _decode_levels(self, indices: tuple[Tensor, ...]) -> list[Tensor]:
        codes = [gather(layer.codebook, own) for layer, own in zip(self.layers, indices, strict=True)]
        return [_layout.channels_back(own, own, self.channel_first) for own in codes]

    def explain(self) -> str:
        """Say in words what runs the search of the first level."""
        return self.layers[0].explain()

    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None):
        """x as of `SimVQ` -> (quantized like x, indices [B, ..., Q], losses [Q]) and, if asked, codes [Q, ...]."""
        rest, total = x, 0.0
        found, losses = [], []
        for layer in self.layers[: self._levels(x.device, rand_quantize_dropout_fixed_seed)]:
            quantized, own, loss = layer(rest)
            rest, total = rest - quantized.detach(), total + quantized
            found.append(own)
            losses.append(loss)
        indices, losses = self._stacked(found), self._stacked(losses, 0)
        result = (total, indices, losses)
        return (*result, self.get_codes_from_indices(indices)) if return_all_codes else result

"""Face of rosinality/vq-vae-2-pytorch (vqvae.Quantize): the same constructor, results and state dict."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat import _parts


class QuantizeMethods:
    """forward of `Quantize` by the exact search; the codebook is stored as [D, K], a code per column."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] -> (quantized [..., D] with straight-through gradient, mean squared error, indices [...] int64)."""
        rows = input.reshape(-1, self.dim)
        found = _parts.lookup(rows, self.embed.t())
        embed_ind = found.view(*input.shape[:-1])
        quantize = self.embed_code(embed_ind)
        if self.training:
            counts, sums = _parts.counts_and_sums(rows, found, self.n_embed)
            _parts.sum_over_processes_(counts, sums)
            _parts.blend_(self.cluster_size, counts, self.decay)
            _parts.blend_(self.embed_avg, sums.t(), self.decay)
            self.embed.data.copy_(self.embed_avg / _parts.smoothed(self.cluster_size, self.eps))
        diff = (quantize.detach() - input).pow(2).mean()
        return _parts.straight_through(input, quantize), diff, embed_ind


class Quantize(QuantizeMethods, nn.Module):
    """Moving-average quantizer on channels-last input.

    Args:
        dim: D. n_embed: K. decay: share of the old averages kept per training step. eps: of the Laplace smoothing.

    State: embed, embed_avg [dim, n_embed] (transposed codebooks), cluster_size [n_embed].

    Source: https://github.com/rosinality/vq-vae-2-pytorch, vqvae.py.
    """

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes [..., D] of indices [...]."""
        return F.embedding(embed_id, self.embed.transpose(0, 1))

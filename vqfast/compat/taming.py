"""Faces of taming-transformers' quantizers (taming.modules.vqvae.quantize): constructors, results and state dicts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat import _parts


class VectorQuantizer2Methods:
    """forward of `VectorQuantizer2`, and of diffusers' `VectorQuantizer`, by the exact search."""

    def forward(self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False):
        """z [B, C, H, W] -> (quantized, loss, (None, None, indices)); the last three arguments exist for Gumbel's sake only."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits belong to GumbelQuantize; leave them at their defaults.")
        z = _parts.image_rows(z)
        indices = _parts.lookup(z.flatten(0, -2), self.embedding.weight)
        codes = self.embedding(indices).view(z.shape)
        into_z, into_codes = _parts.mean_errors(z, codes)
        loss = into_z + self.beta * into_codes if self.legacy else self.beta * into_z + into_codes
        z_q = _parts.image(_parts.straight_through(z, codes))
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(z.shape[:3])
        return z_q, loss, (None, None, indices)


class _Remapping:
    """The tables between all codes and those that a file lists as used."""

    def _set_remap(self, remap, unknown_index, codebook_size: int) -> None:
        self.remap, self.re_embed = remap, codebook_size
        if remap is None:
            return
        import numpy as np

        self.register_buffer("used", torch.from_numpy(np.load(remap)))
        self.re_embed = self.used.shape[0]
        self.unknown_index = unknown_index
        if unknown_index == "extra":
            self.unknown_index = self.re_embed
            self.re_embed += 1

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Index of a code [B, ...] -> its place in `used`; codes that are not there get unknown_index, or a random place."""
        used, order = self.used.to(inds).sort(stable=True)
        place = torch.searchsorted(used, inds).clamp(max=len(used) - 1)
        known = used[place] == inds
        if self.unknown_index == "random":
            return torch.where(known, order[place], torch.randint(0, self.re_embed, inds.shape, device=inds.device))
        return torch.where(known, order[place], self.unknown_index)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Inverse of `remap_to_used`; the extra token becomes the first used code."""
        return self.used.to(inds)[torch.where(inds < len(self.used), inds, 0)]


class VectorQuantizer2(VectorQuantizer2Methods, _Remapping, nn.Module):
    """Quantizer of channels-first images whose codebook learns by gradient.

    loss = mean (sg[code] - z)^2 + beta mean (code - sg[z])^2 with legacy=True (beta on the codebook term, as published
    checkpoints were trained); beta on the first term with legacy=False.

    Args:
        n_e: K. e_dim: D. beta: weight. remap: .npy file of used codes. unknown_index: "random", "extra" or an integer.
        sane_index_shape: return indices [B, H, W] instead of flat. legacy: see above.

    State: embedding.weight [n_e, e_dim]; `used` with remap.

    Source: https://github.com/CompVis/taming-transformers, taming/modules/vqvae/quantize.py.
    """

    def __init__(self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self._set_remap(remap, unknown_index, n_e)
        self.sane_index_shape = sane_index_shape

    def get_codebook_entry(self, indices: Tensor, shape) -> Tensor:
        """Codes of flat indices; `shape` is (B, H, W, C), or None for [N, C]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        codes = self.embedding(indices)
        return codes if shape is None else _parts.image(codes.view(shape))


class EmbeddingEMA(nn.Module):
    """Codebook that follows moving averages; parameters without gradient, as the peer stores them."""

    def __init__(self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        weight = torch.randn(num_tokens, codebook_dim)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.update = True

    def forward(self, embed_id: Tensor) -> Tensor:
        return F.embedding(embed_id, self.weight)

    def cluster_size_ema_update(self, new_cluster_size: Tensor) -> None:
        _parts.blend_(self.cluster_size, new_cluster_size, self.decay)

    def embed_avg_ema_update(self, new_embed_avg: Tensor) -> None:
        _parts.blend_(self.embed_avg, new_embed_avg, self.decay)

    def weight_update(self, num_tokens: int) -> None:
        self.weight.data.copy_(self.embed_avg / _parts.smoothed(self.cluster_size, self.eps)[:, None])


class EMAVectorQuantizer(_Remapping, nn.Module):
    """Moving-average quantizer of channels-first images; the peer's own raises NameError in its constructor.

    loss = beta mean (sg[code] - z)^2. Statistics are summed over processes; perplexity is this process's.

    Args:
        n_embed: K. embedding_dim: D. beta, decay, eps: weights. remap, unknown_index: see `VectorQuantizer2`.

    forward(z) -> (quantized, loss, (perplexity, None, indices)): the one-hot encodings, N x K, are not made.

    State: embedding.{weight, embed_avg} [n_embed, embedding_dim], embedding.cluster_size [n_embed].
    """

    def __init__(self, n_embed, embedding_dim, beta, decay=0.99, eps=1e-5, remap=None, unknown_index="random"):
        super().__init__()
        self.codebook_dim, self.num_tokens, self.beta = embedding_dim, n_embed, beta
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)
        self._set_remap(remap, unknown_index, n_embed)

    def forward(self, z: Tensor):
        z = _parts.image_rows(z)
        rows = z.flatten(0, -2)
        indices = _parts.lookup(rows, self.embedding.weight)
        codes = self.embedding(indices).view(z.shape)
        counts, sums = _parts.counts_and_sums(rows, indices, self.num_tokens)
        share = counts / len(rows)
        perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        if self.training and self.embedding.update:
            _parts.sum_over_processes_(counts, sums)
            self.embedding.cluster_size_ema_update(counts)
            self.embedding.embed_avg_ema_update(sums)
            self.embedding.weight_update(self.num_tokens)
        loss = self.beta * F.mse_loss(codes.detach(), z)
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
        return _parts.image(_parts.straight_through(z, codes)), loss, (perplexity, None, indices)

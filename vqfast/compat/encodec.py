"""Faces of EnCodec's quantizers (encodec.quantization); audiocraft's codebook has the same methods, moshi's a similar one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat import _parts


class EuclideanCodebookMethods:
    """The search, the k-means start and the update of `EuclideanCodebook` (encodec, audiocraft), without N x K matrices."""

    def quantize(self, x: Tensor) -> Tensor:
        """Rows [N, D] -> indices [N]."""
        return _parts.lookup(x, self.embed)

    def init_embed_(self, data: Tensor) -> None:
        """Start the codebook by k-means on the first training batch [N, D]."""
        if self.inited:
            return
        codes, counts = _parts.lloyd(data.detach(), self.codebook_size, self.kmeans_iters)
        self.embed.data.copy_(codes)
        self.embed_avg.data.copy_(codes)
        self.cluster_size.data.copy_(counts)
        self.inited.data.fill_(1.0)
        _parts.broadcast_(*self.buffers())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] -> (codes [..., D], indices [...]); in training the codebook moves after the lookup."""
        rows = x.reshape(-1, x.shape[-1])
        self.init_embed_(rows)
        found = self.quantize(rows)
        indices = found.view(x.shape[:-1])
        quantized = F.embedding(indices, self.embed)
        if self.training:
            self.expire_codes_(rows.detach())
            counts, sums = _parts.counts_and_sums(rows, found, self.codebook_size)
            self._combine_(counts, sums)
            _parts.blend_(self.cluster_size, counts, self.decay)
            _parts.blend_(self.embed_avg, sums, self.decay)
            self.embed.data.copy_(self.embed_avg / _parts.smoothed(self.cluster_size, self.epsilon)[:, None])
        return quantized, indices

    def _combine_(self, counts: Tensor, sums: Tensor) -> None:
        """Each process keeps its own statistics, as in the peer, whose users synchronise buffers themselves."""


class MoshiCodebookMethods:
    """The search of moshi's codebook, rows [N, D] -> indices [N]; its own update makes no N x K matrix."""

    def _quantize(self, x: Tensor) -> Tensor:
        return _parts.lookup(x, self.embedding)


class EuclideanCodebook(EuclideanCodebookMethods, nn.Module):
    """Moving-average codebook of one residual level; statistics are summed over processes.

    State: inited [1], cluster_size [K], embed and embed_avg [K, D].
    """

    def __init__(
        self, dim, codebook_size, kmeans_init=False, kmeans_iters=10, decay=0.99, epsilon=1e-5, threshold_ema_dead_code=2
    ):
        super().__init__()
        self.decay, self.codebook_size, self.kmeans_iters = decay, codebook_size, kmeans_iters
        self.epsilon, self.threshold_ema_dead_code = epsilon, threshold_ema_dead_code
        embed = torch.zeros(codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
        self.register_buffer("inited", torch.tensor([not kmeans_init], dtype=torch.float32))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def expire_codes_(self, batch_samples: Tensor) -> None:
        """Replace codes whose moving size is under the threshold by rows of the batch, with their averages.

        The peer replaces `embed` alone and overwrites it from the old averages in the same step, so that its codes never revive.
        """
        dead = self.cluster_size < self.threshold_ema_dead_code
        if self.threshold_ema_dead_code == 0 or not dead.any():
            return
        fresh = _parts.sample_rows(batch_samples.reshape(-1, batch_samples.shape[-1]), self.codebook_size)
        self.embed.data.copy_(torch.where(dead[:, None], fresh, self.embed))
        self.embed_avg.data.copy_(torch.where(dead[:, None], fresh * self.threshold_ema_dead_code, self.embed_avg))
        self.cluster_size.data.clamp_(min=self.threshold_ema_dead_code)
        _parts.broadcast_(*self.buffers())

    def _combine_(self, counts: Tensor, sums: Tensor) -> None:
        _parts.sum_over_processes_(counts, sums)

    def encode(self, x: Tensor) -> Tensor:
        """Rows [..., D] -> indices [...]."""
        return self.quantize(x.reshape(-1, x.shape[-1])).view(x.shape[:-1])

    def decode(self, embed_ind: Tensor) -> Tensor:
        """Indices [...] -> codes [..., D]."""
        return self.dequantize(embed_ind)

    def preprocess(self, x: Tensor) -> Tensor:
        """[..., D] -> rows [N, D]."""
        return x.reshape(-1, x.shape[-1])

    def postprocess_emb(self, embed_ind: Tensor, shape) -> Tensor:
        """Indices [N] of rows of x -> indices in x's shape without the last axis."""
        return embed_ind.view(*shape[:-1])

    def dequantize(self, embed_ind: Tensor) -> Tensor:
        """Indices [...] -> codes [..., D]."""
        return F.embedding(embed_ind, self.embed)


class VectorQuantization(nn.Module):
    """One level on [B, D, N] input, with optional projections; forward -> (quantized, indices [B, N], loss [1]).

    State: `_codebook.*` (see `EuclideanCodebook`), project_in.*, project_out.* where codebook_dim differs from dim.
    """

    def __init__(
        self,
        dim,
        codebook_size,
        codebook_dim=None,
        decay=0.99,
        epsilon=1e-5,
        kmeans_init=True,
        kmeans_iters=50,
        threshold_ema_dead_code=2,
        commitment_weight=1.0,
    ):
        super().__init__()
        inner = dim if codebook_dim is None else codebook_dim
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.epsilon, self.commitment_weight, self.codebook_size = epsilon, commitment_weight, codebook_size
        self._codebook = EuclideanCodebook(
            inner, codebook_size, kmeans_init, kmeans_iters, decay, epsilon, threshold_ema_dead_code
        )

    @property
    def codebook(self) -> Tensor:
        """[K, D]"""
        return self._codebook.embed

    def encode(self, x: Tensor) -> Tensor:
        """[B, D, N] -> indices [B, N]."""
        return self._codebook.encode(self.project_in(x.transpose(1, 2)))

    def decode(self, embed_ind: Tensor) -> Tensor:
        """Indices [B, N] -> [B, D, N]."""
        return self.project_out(self._codebook.decode(embed_ind)).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x.transpose(1, 2))
        quantized, indices = self._codebook(x)
        loss = torch.zeros(1, device=x.device, requires_grad=self.training)
        if self.training:
            quantized = _parts.straight_through(x, quantized)
            if self.commitment_weight > 0:
                loss = loss + F.mse_loss(quantized.detach(), x) * self.commitment_weight
        return self.project_out(quantized).transpose(1, 2), indices, loss


class ResidualVectorQuantization(nn.Module):
    """Levels in a row on [B, D, N]; forward -> (quantized, indices [Q, B, N], losses [Q, 1]).

    Gradient: d quantized / d x is the identity, and the commitment loss of a level after the first has none, as in the peer:
    what the levels before leave over is constant under straight-through.
    """

    def __init__(self, *, num_quantizers: int, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(VectorQuantization(**kwargs) for _ in range(num_quantizers))

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        total, rest, indices, losses = 0.0, x, [], []
        for layer in self.layers[: n_q or len(self.layers)]:
            quantized, found, loss = layer(rest)
            rest, total = rest - quantized, total + quantized
            indices.append(found)
            losses.append(loss)
        return total, torch.stack(indices), torch.stack(losses)

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        """[B, D, N] -> indices [n_q, B, N]."""
        rest, indices = x, []
        for layer in self.layers[: n_q or len(self.layers)]:
            indices.append(layer.encode(rest))
            rest = rest - layer.decode(indices[-1])
        return torch.stack(indices)

    def decode(self, q_indices: Tensor) -> Tensor:
        """Indices [n_q, B, N] -> [B, D, N]."""
        return sum(layer.decode(found) for layer, found in zip(self.layers, q_indices))


@dataclass
class QuantizedResult:
    """Result of `ResidualVectorQuantizer`; bandwidth in bits per second, penalty the mean commitment loss."""

    quantized: Tensor
    codes: Tensor
    bandwidth: Tensor
    penalty: Tensor | None = None
    metrics: dict = field(default_factory=dict)


class ResidualVectorQuantizer(nn.Module):
    """EnCodec's residual quantizer with a bandwidth.

    Args:
        dimension: D. n_q: levels. bins: codes per level. decay, kmeans_init, kmeans_iters, threshold_ema_dead_code: per level.

    Names and units are those of the repository's head; release 0.1.1 calls frame_rate sample_rate and reports kilobits.

    State: vq.layers.{i}._codebook.{inited, cluster_size, embed, embed_avg}.

    Source: https://github.com/facebookresearch/encodec, encodec/quantization; Defossez et al. 2022.
    """

    def __init__(
        self, dimension=256, n_q=8, bins=1024, decay=0.99, kmeans_init=True, kmeans_iters=50, threshold_ema_dead_code=2
    ):
        super().__init__()
        self.n_q, self.dimension, self.bins, self.decay = n_q, dimension, bins, decay
        self.kmeans_init, self.kmeans_iters, self.threshold_ema_dead_code = kmeans_init, kmeans_iters, threshold_ema_dead_code
        self.vq = ResidualVectorQuantization(
            dim=dimension,
            codebook_size=bins,
            num_quantizers=n_q,
            decay=decay,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
        )

    def forward(self, x: Tensor, frame_rate: int, bandwidth: float | None = None) -> QuantizedResult:
        """x [B, D, N], frame_rate in Hz, bandwidth in kilobits per second (None: all levels)."""
        n_q = self.get_num_quantizers_for_bandwidth(frame_rate, bandwidth)
        quantized, codes, losses = self.vq(x, n_q=n_q)
        used = torch.tensor(n_q * self.get_bandwidth_per_quantizer(frame_rate)).to(x)
        return QuantizedResult(quantized, codes, used, penalty=losses.mean())

    def get_num_quantizers_for_bandwidth(self, frame_rate: int, bandwidth: float | None = None) -> int:
        """Levels that fit into a bandwidth in kilobits per second, at least one; all without one."""
        if not bandwidth or bandwidth <= 0:
            return self.n_q
        return max(1, math.floor(bandwidth * 1000 / self.get_bandwidth_per_quantizer(frame_rate)))

    def get_bandwidth_per_quantizer(self, frame_rate: int) -> float:
        """Bits per second of one level."""
        return math.log2(self.bins) * frame_rate

    def encode(self, x: Tensor, frame_rate: int, bandwidth: float | None = None) -> Tensor:
        """[B, D, N] -> codes [n_q, B, N]."""
        return self.vq.encode(x, n_q=self.get_num_quantizers_for_bandwidth(frame_rate, bandwidth))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n_q, B, N] -> [B, D, N]."""
        return self.vq.decode(codes)

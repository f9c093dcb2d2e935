"""Faces of Sonnet's quantizers (sonnet.nets.VectorQuantizer, VectorQuantizerEMA) on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat import _parts
from vqfast.ops import _shapes


class Outputs(dict):
    """Sonnet's result; `encodings` and `distances`, both [N, K], are made when they are asked for."""

    def __init__(self, values: dict, made_on_demand: dict[str, Callable[[], Tensor]]):
        super().__init__(values | dict.fromkeys(made_on_demand))
        self._made_on_demand = dict(made_on_demand)

    def __getitem__(self, key):
        make = self._made_on_demand.pop(key, None)
        if make is not None:
            self[key] = make()
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


class _MovingAverage(nn.Module):
    """Sonnet's ExponentialMovingAverage: debiased by 1 - decay^t."""

    def __init__(self, shape, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("_counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_hidden", torch.zeros(shape))
        self.register_buffer("average", torch.zeros(shape))

    def forward(self, value: Tensor) -> Tensor:
        self._counter += 1
        self._hidden.lerp_(value.to(self._hidden), 1.0 - self.decay)
        self.average.copy_(self._hidden / (1.0 - torch.as_tensor(self.decay, dtype=torch.float64) ** self._counter))
        return self.average


class VectorQuantizer(nn.Module):
    """Quantizer whose codebook learns by gradient.

    loss = mean (code - sg[x])^2 + commitment_cost mean (sg[code] - x)^2.

    Args:
        embedding_dim: D, the last axis of the inputs. num_embeddings: K. commitment_cost: beta. dtype: of the codebook.

    State: embeddings [D, K], a code per column.

    Source: https://github.com/google-deepmind/sonnet, sonnet/src/nets/vqvae.py.
    """

    def __init__(self, embedding_dim: int, num_embeddings: int, commitment_cost: float, dtype=torch.float32, name=""):
        super().__init__()
        self.embedding_dim, self.num_embeddings, self.commitment_cost = embedding_dim, num_embeddings, commitment_cost
        limit = (3.0 / embedding_dim) ** 0.5
        self._set_embeddings(torch.empty(embedding_dim, num_embeddings, dtype=dtype).uniform_(-limit, limit))

    def _set_embeddings(self, embeddings: Tensor) -> None:
        self.embeddings = nn.Parameter(embeddings)

    def forward(self, inputs: Tensor, is_training: bool) -> Outputs:
        """inputs [..., D] -> quantize (straight-through), loss, perplexity, encoding_indices [...], encodings, distances [N, K]."""
        if inputs.shape[-1] != self.embedding_dim:
            raise ValueError(f"inputs are {_shapes.describe(inputs)}, the last axis must be embedding_dim={self.embedding_dim}.")
        rows, codes = inputs.reshape(-1, self.embedding_dim), self.embeddings.detach().t().clone()
        found = _parts.lookup(rows, codes)
        quantized = self.quantize(found).view(inputs.shape)
        loss = self._loss(inputs, quantized)
        counts, sums = _parts.counts_and_sums(rows, found, self.num_embeddings)
        if is_training:
            self._learn(counts, sums)
        share = counts / max(len(rows), 1)
        return Outputs(
            {
                "quantize": _parts.straight_through(inputs, quantized),
                "loss": loss,
                "perplexity": torch.exp(-torch.sum(share * torch.log(share + 1e-10))),
                "encoding_indices": found.view(inputs.shape[:-1]),
            },
            {
                "encodings": lambda: F.one_hot(found, self.num_embeddings).to(rows.dtype),
                "distances": lambda: rows.square().sum(1, keepdim=True) - 2 * rows @ codes.t() + codes.square().sum(1),
            },
        )

    def quantize(self, encoding_indices: Tensor) -> Tensor:
        """Indices [...] -> codes [..., D]."""
        return F.embedding(encoding_indices, self.embeddings.t())

    def _loss(self, inputs: Tensor, quantized: Tensor) -> Tensor:
        into_inputs, into_codes = _parts.mean_errors(inputs, quantized)
        return into_codes + self.commitment_cost * into_inputs

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        """The codebook learns from the loss."""


class VectorQuantizerEMA(VectorQuantizer):
    """Quantizer whose codebook follows debiased moving averages; loss = commitment_cost mean (sg[code] - x)^2.

    Args:
        embedding_dim, num_embeddings, commitment_cost, dtype: see `VectorQuantizer`. decay: share of the old averages kept.
        epsilon: of the Laplace smoothing of the sizes.

    A code that no row ever chose becomes zero, as in Sonnet. Where several processes train, statistics are summed over them.

    State: embeddings [D, K]; ema_cluster_size and ema_dw, each with _counter, _hidden and average.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int,
        commitment_cost: float,
        decay: float,
        epsilon: float = 1e-5,
        dtype=torch.float32,
        name="",
    ):
        super().__init__(embedding_dim, num_embeddings, commitment_cost, dtype)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in 0..1, got {decay}.")
        self.decay, self.epsilon = decay, epsilon
        self.ema_cluster_size = _MovingAverage(num_embeddings, decay)
        self.ema_dw = _MovingAverage((embedding_dim, num_embeddings), decay)

    def _set_embeddings(self, embeddings: Tensor) -> None:
        self.register_buffer("embeddings", embeddings)

    def _loss(self, inputs: Tensor, quantized: Tensor) -> Tensor:
        return self.commitment_cost * _parts.mean_errors(inputs, quantized)[0]

    @torch.no_grad()
    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        _parts.sum_over_processes_(counts, sums)
        sizes, dw = self.ema_cluster_size(counts), self.ema_dw(sums.t())
        self.embeddings.copy_(dw / _parts.smoothed(sizes, self.epsilon))

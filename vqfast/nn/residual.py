"""ResidualVectorQuantizer: levels of quantizers, each on what the levels before left over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqfast.nn import _revival
from vqfast.nn._distributed import all_gather_rows
from vqfast.nn.vector_quantizer import VectorQuantizerEMA
from vqfast.ops import _shapes, quantize, residual
from vqfast.ops.gather import gather
from vqfast.ops.kmeans import kmeans


class ResidualVectorQuantizer(VectorQuantizerEMA):
    """Residual vector quantizer with moving-average codebooks.

    r_0 = z, code_q = nearest(r_q), r_{q+1} = r_q - code_q, quantized = sum_q code_q; loss = commitment_weight * mean over levels
    of mean (r_q - sg[code_q])^2.

    Args:
        dim: channels of z. codebook_size: codes per level.
        num_quantizers: levels Q.
        quantizer_dropout: probability that a training forward uses only the first n levels, n drawn uniformly from 1..Q.
        commitment_weight, metric, codebook_dim, channel_dim, decay, eps, rule, revive_below, auto_update, process_group: see
            `VectorQuantizerEMA`.

    Attributes:
        codebook, cluster_sum: buffers [Q, K, D]; cluster_size [Q, K].

    Indices carry the level last: [B, ..., Q]; -1 at levels that were not used.

    Gradient: d quantized / d z is the identity (as in EnCodec).

    Source: Zeghidour et al. 2021 (SoundStream), algorithm 1.
    """

    def __init__(self, dim: int, codebook_size: int, *, num_quantizers: int, quantizer_dropout: float = 0.0, **options):
        if not isinstance(num_quantizers, int) or num_quantizers < 1:
            raise ValueError(f"num_quantizers must be a positive integer, got {num_quantizers!r}.")
        if not 0.0 <= quantizer_dropout <= 1.0:
            raise ValueError(f"quantizer_dropout must lie in 0..1, got {quantizer_dropout}.")
        if options.get("groups", 1) != 1:
            raise ValueError("ResidualVectorQuantizer has no groups; quantize channel groups by one layer each.")
        self.num_quantizers, self.quantizer_dropout = num_quantizers, quantizer_dropout
        super().__init__(dim, codebook_size, **options)

    def _stored_shape(self) -> tuple[int, ...]:
        return self.num_quantizers, self.codebook_size, self.codebook_dim

    def forward(self, z: Tensor, mask: Tensor | None = None, num_quantizers: int | None = None) -> quantize.Quantized:
        """Quantize z with the first `num_quantizers` levels (all by default); see `VectorQuantizer.forward`."""
        # The levels of this call travel with the rows, not in the layer, so that forward stays re-entrant.
        active = self._levels(num_quantizers)
        return self._forward(z, mask, lambda rows, mask, with_sums: self._search_levels(rows, mask, with_sums, active))

    def _search_levels(self, rows: Tensor, mask: Tensor | None, with_sums: bool, active: int) -> quantize.Step:
        codebooks = self.codebook[:active, None]
        step = residual.step(rows, codebooks, mask, metric=self.metric_code, with_sums=with_sums)
        missing = self.num_quantizers - active
        counts = nn.functional.pad(step.counts[:, 0], (0, 0, 0, missing))
        sums = nn.functional.pad(step.sums[:, 0], (0, 0, 0, 0, 0, missing)) if with_sums else step.sums
        return step._replace(sq_error=step.sq_error / active, sums=sums, counts=counts)

    def _levels(self, asked: int | None) -> int:
        if asked is not None:
            if not 1 <= asked <= self.num_quantizers:
                raise ValueError(f"num_quantizers must lie in 1..{self.num_quantizers}, got {asked}.")
            return asked
        if self.training and self.quantizer_dropout > 0 and float(torch.rand(())) < self.quantizer_dropout:
            return int(torch.randint(1, self.num_quantizers + 1, ()))
        return self.num_quantizers

    def encode(self, z: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Indices [B, ..., Q] of z, -1 at levels beyond `num_quantizers`."""
        active = self.num_quantizers if num_quantizers is None else self._levels(num_quantizers)
        with torch.no_grad():
            rows, like = self._rows(z)
            found = residual.step(rows, self.codebook[:active, None], metric=self.metric_code)
        return self._indices_to_user(found.indices, like)

    def decode(self, indices: Tensor) -> Tensor:
        """Sum of the codes of indices [B, ..., n], n <= Q levels, as the layer's output layout; -1 adds nothing."""
        indices = _shapes.check_indices("indices", indices)
        levels = indices.shape[-1]
        if indices.dim() < 2 or not 1 <= levels <= self.num_quantizers:
            raise ValueError(
                f"indices are {_shapes.describe(indices)}: they need the levels last, 1 to {self.num_quantizers} of them."
            )
        like = tuple(indices.shape[:-1])
        flat = indices.reshape(1, -1, levels) if len(like) == 1 else indices.flatten(1, -2)
        total = sum(gather(self.codebook[level], flat[..., level]) for level in range(levels))
        return self._to_layout(total[:, None], like)

    def _valid_rows(self, step: quantize.Step) -> Tensor:
        return step.counts[0].sum()

    def _candidates(self, rows: Tensor, step: quantize.Step) -> Tensor:
        """Rows of what each level had to quantize: a dead code of level q is replaced by a rest r_q."""
        if min(self._slots(), rows.shape[0] * rows.shape[2]) == 0:
            return rows.new_zeros(self.num_quantizers, 0, rows.shape[-1] + 1, dtype=torch.float32)
        picked, real = _revival.pick(step.indices[0], step.quantized, self.updates, self._slots())
        pools, rest = [], _revival.at(rows, picked).to(torch.float32)  # [1, slots, D]
        for level in range(self.num_quantizers):
            pools.append(_revival.pool_of(rest, real))
            if level < len(step.indices):
                chosen = _revival.at(step.indices[level], picked)[None]
                rest = rest - gather(self.codebook[level][None], chosen, validate=False)[0]
        return torch.cat(pools)

    @torch.no_grad()
    def init_codebook_(self, batch: Tensor, *, iterations: int = 10, seed: int = 0) -> None:
        """Set every level's codebook by k-means on what the levels before leave over; see `VectorQuantizer.init_codebook_`."""
        rest = all_gather_rows(self._rows(batch)[0].flatten(0, 2).to(torch.float32), self.process_group)
        codebooks = []
        for level in range(self.num_quantizers):
            found = kmeans(rest, self.codebook_size, iterations=iterations, seed=seed + level)
            codebooks.append(found.codebook)
            rest = rest[rest.isfinite().all(-1)]
            rest = rest - found.codebook[found.indices]
        self.set_codebook_(torch.stack(codebooks))

    def _indices_to_user(self, indices: Tensor, like: tuple[int, ...]) -> Tensor:
        indices = indices[:, :, 0].movedim(0, -1)  # [B, N, q]
        missing = self.num_quantizers - indices.shape[-1]
        return nn.functional.pad(indices, (0, missing), value=-1).reshape(*like, self.num_quantizers)

"""`LFQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import nn as dist_nn

from vqfast import _border
from vqfast.compat.vector_quantize_pytorch import _layout, _plain
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import l2norm, straight_through  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    exists,
    identity,
    is_distributed,
    maybe_distributed_mean,
)
from vqfast.compat.vector_quantize_pytorch._helpers import first_given_called as default  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import log_of_share as log  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import pack as pack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import unpack as unpack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.finite_scalar_quantization import full_precision
from vqfast.nn._distributed import world


@_border.exportable
class Return(NamedTuple):
    """Result of LFQ."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


@_border.exportable
class LossBreakdown(NamedTuple):
    """Terms of LFQ's loss before their weights."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


def entropy(prob: Tensor) -> Tensor:
    """Entropy in nats along the last axis, logarithms of shares under 1e-5 cut off."""
    return -(prob * prob.clamp(min=1e-5).log()).sum(-1)


class CosineSimLinear(nn.Module):
    """scale * cosine between x and each column of the weight [dim_in, dim_out]."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0) * self.scale


class LFQ(nn.Module):
    """Lookup-free quantization: every channel becomes +scale or -scale; entropy terms keep all codes in use.

    loss = entropy_loss_weight * (mean entropy of each row's code probabilities - diversity_gamma * entropy of their mean)
    + commitment_loss_weight * mean (x - sg[quantized])^2, in training.

    State dict: `mask`, `project_in.*`, `project_out.*` with a projection, `orthogonal_rot`.

    Source: Yu et al. 2023 (arXiv 2310.05737), eq. 3; spherical: Zhao et al. 2024 (arXiv 2406.07548).
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        require(dim is not None or codebook_size is not None, "pass dim or codebook_size.")
        codebook_size = 2**dim if codebook_size is None else codebook_size
        whole = log2(codebook_size).is_integer()
        require(whole, f"codebook_size must be a power of 2, got {codebook_size}; {2 ** ceil(log2(codebook_size))} is the next.")
        require(0 < frac_per_sample_entropy <= 1, f"frac_per_sample_entropy must lie in 0..1, got {frac_per_sample_entropy}.")
        clamps = soft_clamp_input_value is None or soft_clamp_input_value >= codebook_scale
        require(clamps, f"soft_clamp_input_value must be at least codebook_scale={codebook_scale}, got {soft_clamp_input_value}.")
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        require(keep or num_codebooks == 1, "several codebooks need keep_num_codebooks_dim=True.")
        self.codebook_size, self.codebook_dim, self.num_codebooks = codebook_size, int(log2(codebook_size)), num_codebooks
        inner = self.codebook_dim * num_codebooks
        self.dim = inner if dim is None else dim
        self.keep_num_codebooks_dim, self.channel_first, self.codebook_scale = keep, channel_first, codebook_scale
        self.has_projections = self.dim != inner if has_projections is None else has_projections
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections and cosine_sim_project_in:
            scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
            self.project_in = CosineSimLinear(self.dim, inner, scale)
        elif self.has_projections:
            self.project_in = nn.Linear(self.dim, inner, bias=projection_has_bias)
        if self.has_projections:
            self.project_out = nn.Linear(inner, self.dim, bias=projection_has_bias)
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.spherical, self.orthogonal_rotation = spherical, orthogonal_rotation
        if orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            nn.init.orthogonal_(rotation)
            self.register_buffer("orthogonal_rot", rotation)
        self.frac_per_sample_entropy, self.diversity_gamma = frac_per_sample_entropy, diversity_gamma
        self.entropy_loss_weight, self.commitment_loss_weight = entropy_loss_weight, commitment_loss_weight
        self.soft_clamp_input_value, self.entropy_loss_offset = soft_clamp_input_value, entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        codebook = self.bits_to_codes(self._bits(torch.arange(codebook_size)).float())
        self.register_buffer("codebook", codebook, persistent=False)

    # -- bits, codes, indices ------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook.dtype

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """t on the sphere of radius codebook_scale, or t itself."""
        return F.normalize(t, dim=-1) * self.codebook_scale if self.spherical else t

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 and 1 to -scale and +scale."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def _bits(self, indices: Tensor) -> Tensor:
        return (indices[..., None] & self.mask) != 0

    def _inner_codes(self, indices: Tensor) -> Tensor:
        """Codes [..., d] of indices [...], as forward makes them before the output projection."""
        codes = self.maybe_l2norm(self.bits_to_codes(self._bits(indices).to(self.dtype)))
        return codes @ self.orthogonal_rot.T if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Output for indices [B, ...] (a last axis of codebooks where there are several), in the layout of forward's input."""
        spatial = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        first = spatial if self.channel_first is None else self.channel_first
        indices = indices if self.keep_num_codebooks_dim else indices[..., None]
        codes = self._inner_codes(indices).flatten(-2)
        codes = self.project_out(codes) if project_out else codes
        return codes.movedim(-1, 1) if first else codes

    # -- forward -----------------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """Say in words which part of this layer compares with every code."""
        return (
            "LFQ: no search; signs of the channels\n"
            f"plain torch, a chunk of {_plain.CHUNK_SCORES} scores at a time, in training: the entropy terms of the loss"
        )

    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ):
        """x [B, N, dim], or channels first with 4 or more axes or channel_first -> Return, and a LossBreakdown if asked.

        mask [B, N] bool, True = valid: which rows enter the loss. indices are int64 [B, ...], with a last axis of codebooks
        where there are several.
        """
        first = x.dim() >= 4 if self.channel_first is None else self.channel_first
        inner = self.project_in(_layout.channels_last(x, self.dim, channel_first=first, spatial=None))
        if self.soft_clamp_input_value is not None:
            inner = (inner / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        inner = inner.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        inner = inner @ self.orthogonal_rot if self.orthogonal_rotation else inner
        inner = self.maybe_l2norm(inner)
        with full_precision(x, self.force_quantization_f32):
            rows = inner.float() if self.force_quantization_f32 else inner
            positive = rows > 0
            indices = (positive * self.mask).sum(-1)
            quantized = self.maybe_l2norm(torch.where(positive, self.codebook_scale, -self.codebook_scale).to(rows.dtype))
            out = straight_through(self.activation(rows), quantized) if self.training else quantized
            loss, breakdown = self._losses(rows, quantized, mask, inv_temperature)
            out = out.to(inner.dtype)
        out = out @ self.orthogonal_rot.T if self.orthogonal_rotation else out
        out = _layout.channels_back(self.project_out(out.flatten(-2)), x, first)
        indices = indices if self.keep_num_codebooks_dim else indices[..., 0]
        result = Return(out, indices, loss)
        return (result, breakdown) if return_loss_breakdown else result

    def _losses(self, rows: Tensor, quantized: Tensor, mask: Tensor | None, inv_temperature: float):
        if not self.training:
            return self.zero, LossBreakdown(self.zero, self.zero, self.zero)
        leading = tuple(rows.shape[:-2])
        mask = _layout.mask_of(rows, leading, mask, None)
        own, aims = (rows.flatten(0, -3), quantized.flatten(0, -3)) if mask is None else (rows[mask], quantized[mask])
        per_sample, batch = self._entropies(own, inv_temperature)
        aux = per_sample - self.diversity_gamma * batch
        aux = F.softplus(aux + self.entropy_loss_offset) if self.experimental_softplus_entropy_loss else aux
        commitment = self.zero
        if self.commitment_loss_weight > 0:
            commitment = (own - aims.detach()).square().sum() / max(own.numel(), 1)
        loss = aux * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return loss, LossBreakdown(per_sample, batch, commitment)

    def _entropies(self, rows: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """Mean entropy of the rows' [n, C, d] code probabilities, and the entropy of their mean, over the codes of this layer."""
        if self.frac_per_sample_entropy < 1:
            number = int(len(rows) * self.frac_per_sample_entropy)
            rows = rows[torch.randn(len(rows)).argsort(-1) < number]
        codebook = self.maybe_l2norm(self.codebook.to(rows.dtype))

        def of_chunk(part: Tensor) -> tuple[Tensor, Tensor]:
            prob = (2 * part @ codebook.T * inv_temperature).softmax(-1)  # distances up to a constant
            return entropy(prob).sum(), prob.sum(0)

        step = max(1, _plain.CHUNK_SCORES // (self.codebook_size * self.num_codebooks))
        sums = [_plain.again_in_backward(of_chunk, part) for part in rows.split(step)]
        total, prob = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        per_sample = total / max(len(rows) * self.num_codebooks, 1)
        prob = prob / max(len(rows), 1)
        if world(None)[1] > 1:
            prob = dist_nn.all_reduce(prob) / world(None)[1]
        return per_sample, entropy(prob).mean()

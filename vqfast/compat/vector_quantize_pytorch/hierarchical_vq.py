"""`HierarchicalVQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._helpers import exists  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._residual import sync_seed as get_maybe_sync_seed
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MODES = ("linear", "bilinear", "trilinear")


def to_level_shape(scale: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """A scale as the sizes of its axes; one number stands for all of them."""
    shape = (scale,) * spatial_dims if isinstance(scale, int) else tuple(scale)
    require(len(shape) == spatial_dims, f"scale {scale} does not fit {spatial_dims} spatial axes.")
    return shape


class _Phi(nn.Module):
    """A convolution mixed into what was upsampled, in the share `ratio`."""

    def __init__(self, dim: int, spatial_dims: int, ratio: float):
        super().__init__()
        self.conv = _CONVOLUTIONS[spatial_dims - 1](dim, dim, 3, padding=1)
        self.ratio = abs(float(ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.ratio <= 1e-8 else x.lerp(self.conv(x), self.ratio)


class HierarchicalVQ(nn.Module):
    """Quantize from coarse to fine: every level pools what is left over, quantizes it and adds it back upsampled.

    State dict: `vq.*`, or `vqs.{level}.*` without shared_codebook; `phi_shared.conv.*` or `phi_levels.{i}.conv.*`.

    Source: Tian et al. 2024 (VAR, arXiv 2404.02905), section 3.2.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ):
        super().__init__()
        require(not (accept_image_fmap and accept_3d_fmap), "choose one of accept_image_fmap and accept_3d_fmap.")
        require(0.0 <= nested_dropout <= 1.0, f"nested_dropout must lie in 0..1, got {nested_dropout}.")
        require(nested_dropout_min_levels >= 1, f"nested_dropout_min_levels must be at least 1, got {nested_dropout_min_levels}.")
        self.dim, self.channel_first, self.scales = dim, channel_first, tuple(scales)
        self.spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        self.level_shapes = tuple(to_level_shape(scale, self.spatial_dims) for scale in scales)
        require(
            self.level_shapes and all(min(shape) > 0 for shape in self.level_shapes), f"scales must be positive, got {scales}."
        )
        grows = (a <= b for low, high in zip(self.level_shapes, self.level_shapes[1:], strict=False) for a, b in zip(low, high, strict=True))
        require(all(grows), f"scales must not decrease, got {scales}.")
        self.num_levels = len(self.level_shapes)
        sizes = (codebook_size,) * self.num_levels if isinstance(codebook_size, int) else tuple(codebook_size)
        require(len(sizes) == self.num_levels, f"codebook_size has {len(sizes)} entries for {self.num_levels} scales.")
        require(not shared_codebook or len(set(sizes)) == 1, "a shared codebook needs equal codebook sizes.")
        self.codebook_sizes = sizes
        self.nested_dropout, self.nested_dropout_min_levels = nested_dropout, nested_dropout_min_levels
        options = {
            "dim": dim,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
        }
        self.vq = VectorQuantize(codebook_size=sizes[0], **options) if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList(VectorQuantize(codebook_size=size, **options) for size in sizes)
        self.phi_shared = self.phi_levels = None
        if share_quant_resi == 1:
            self.phi_shared = _Phi(dim, self.spatial_dims, quant_resi)
        else:
            number = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
            self.phi_levels = nn.ModuleList(_Phi(dim, self.spatial_dims, quant_resi) for _ in range(number))

    def get_vq(self, level_index: int) -> VectorQuantize:
        """The quantizer of a level."""
        return self.vqs[level_index] if self.vq is None else self.vq

    def choose_phi(self, level_index: int) -> _Phi:
        """The convolution of a level; fewer of them than levels are spread evenly."""
        if self.phi_shared is not None:
            return self.phi_shared
        position = level_index / max(self.num_levels - 1, 1)
        return self.phi_levels[round(position * (len(self.phi_levels) - 1))]

    def pool_residual(self, t: Tensor, level_shape: tuple[int, ...], mask: Tensor | None = None):
        """t [B, C, ...] averaged to level_shape over valid positions, and which cells hold one (None without a mask)."""
        pool = _POOLS[self.spatial_dims - 1]
        if mask is None:
            return pool(t, level_shape), None
        mask = mask[:, None].to(torch.promote_types(t.dtype, torch.float32))  # means of half precision rows in float32
        share = pool(mask, level_shape)
        return pool(t * mask, level_shape) / share.clamp(min=1e-6), share[:, 0] > 0

    def upsample_to_full(self, q: Tensor, full_shape: tuple[int, ...], level_index: int) -> Tensor:
        """q [B, C, ...] at full resolution, through the level's convolution."""
        if tuple(q.shape[2:]) != tuple(full_shape):
            q = F.interpolate(q, size=full_shape, mode=_MODES[self.spatial_dims - 1], align_corners=False)
        return self.choose_phi(level_index)(q)

    def sample_nested_cutoff(self, device: torch.device) -> int | None:
        """In training, with probability nested_dropout, the last level that counts; the same on every process."""
        spare = self.nested_dropout_min_levels < self.num_levels
        if not self.training or self.nested_dropout <= 0 or not spare:
            return None
        draw = random.Random(get_maybe_sync_seed(device))
        if draw.random() >= self.nested_dropout:
            return None
        return draw.randrange(self.nested_dropout_min_levels - 1, self.num_levels - 1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ):
        """Quantize x [B, dim, L] ([B, dim, H, W], [B, dim, D, H, W]; channels last with channel_first=False).

        mask: x's shape without channels, True = valid; lens [B] the same for sequences.

        Returns:
            (quantized like x, a tuple of indices [B, *level shape] per level, loss []), and the cutoff level or None if asked.
        """
        require(indices is None, "forward does not take indices; use get_output_from_indices.")
        inner = _layout.channels_last(x, self.dim, channel_first=self.channel_first, spatial=self.spatial_dims)
        require(inner.dim() == self.spatial_dims + 2, f"x is {list(x.shape)}; it needs {self.spatial_dims} spatial axes.")
        full_shape = tuple(inner.shape[1:-1])
        require(lens is None or self.spatial_dims == 1, "lens is for sequences only.")
        mask = _layout.mask_of(inner, tuple(inner.shape[:-1]), mask, lens)
        residual = inner.movedim(-1, 1)
        total, sums, found, losses = torch.zeros_like(residual), [], [], []
        for level, level_shape in enumerate(self.level_shapes):
            pooled, valid = self.pool_residual(residual, level_shape, mask)
            valid = None if valid is None else valid.flatten(1)
            quantized, own, loss = self.get_vq(level)(
                pooled.flatten(2).transpose(1, 2), mask=valid, sample_codebook_temp=sample_codebook_temp
            )
            quantized = self.upsample_to_full(quantized.transpose(1, 2).unflatten(2, level_shape), full_shape, level)
            total, residual = total + quantized, residual - quantized
            sums.append(total)
            found.append(own.unflatten(1, level_shape))
            losses.append(loss)
        cutoff = self.sample_nested_cutoff(x.device)
        total = total if cutoff is None else sums[cutoff]
        loss = torch.stack(losses if cutoff is None else losses[: cutoff + 1]).mean()
        if mask is not None:
            total = torch.where(mask[:, None], total, 0.0)
        out = _layout.channels_back(total.movedim(1, -1), x, self.channel_first)
        return (out, tuple(found), loss, cutoff) if return_cutoff else (out, tuple(found), loss)

    def get_output_from_indices(self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None) -> Tensor:
        """What forward returned for these indices per level, at `full_shape` or the last level's; -1 gives zeros."""
        require(len(indices) == self.num_levels, f"indices hold {len(indices)} levels, this layer has {self.num_levels}.")
        full_shape = self.level_shapes[-1] if full_shape is None else to_level_shape(full_shape, self.spatial_dims)
        total = 0.0
        for level, own in enumerate(indices):
            codes = self.get_vq(level).get_output_from_indices(own.flatten(1))
            codes = codes.transpose(1, 2).unflatten(2, tuple(own.shape[1:]))
            total = total + self.upsample_to_full(codes, full_shape, level)
        return total if self.channel_first else total.movedim(1, -1)

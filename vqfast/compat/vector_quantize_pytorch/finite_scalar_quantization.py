"""`FSQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import StraightThrough
from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    exists,
    identity,
    maybe,
)
from vqfast.compat.vector_quantize_pytorch._helpers import first_given as default  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import pack as pack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import unpack as unpack_one  # noqa: F401


def round_ste(z: Tensor) -> Tensor:
    """z rounded to the nearest integer, with the gradient of z."""
    return StraightThrough.apply(z, z.detach().round())


def floor_ste(z: Tensor) -> Tensor:
    """z rounded down, with the gradient of z."""
    return StraightThrough.apply(z, z.detach().floor())


def full_precision(t: Tensor, wanted: bool = True):
    """A block without autocast on t's device, or none."""
    return torch.autocast(t.device.type, enabled=False) if wanted else nullcontext()


class FSQ(nn.Module):
    """Finite scalar quantization: every channel is squashed and rounded to one of a few levels; no codebook, no search.

    State dict: empty, but for `project_in.*`, `project_out.*` with a projection and `orthogonal_rot`.

    Source: Mentzer et al. 2023 (arXiv 2309.15505); symmetric levels and noise: Parker et al. 2024 (arXiv 2411.19842), section
    3.2; rotation: Chee et al. 2023 (arXiv 2307.13304).
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ):
        super().__init__()
        levels = list(levels)
        require(preserve_symmetry or 2 not in levels, "two levels need preserve_symmetry=True; or use more levels.")
        require(preserve_symmetry or noise_dropout == 0, "noise_dropout needs preserve_symmetry=True.")
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        require(keep or num_codebooks == 1, "several codebooks need keep_num_codebooks_dim=True.")
        counts = torch.tensor(levels, dtype=torch.int32)
        self.register_buffer("_levels", counts, persistent=False)
        self.register_buffer("_basis", torch.tensor([1, *levels[:-1]]).cumprod(0, dtype=torch.int32), persistent=False)
        self.scale, self.preserve_symmetry, self.noise_dropout = scale, preserve_symmetry, noise_dropout
        self.codebook_dim, self.num_codebooks, self.keep_num_codebooks_dim = len(levels), num_codebooks, keep
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first, self.return_indices, self.allowed_dtypes = channel_first, return_indices, allowed_dtypes
        self.force_quantization_f32, self.bound_hard_clamp = force_quantization_f32, bound_hard_clamp
        self.has_projections = self.dim != self.effective_codebook_dim
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        else:
            self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if return_indices:
            self.codebook_size = int(counts.prod())
            codebook = self._indices_to_codes(torch.arange(self.codebook_size))
            self.register_buffer("implicit_codebook", codebook, persistent=False)
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            rotation = torch.empty(self.codebook_dim, self.codebook_dim)
            nn.init.orthogonal_(rotation)
            self.register_buffer("orthogonal_rot", rotation)

    # -- values and codes ----------------------------------------------------------------------------------------------------

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Squash z [..., d] and round it to the levels, as values in -1..1."""
        half = (self._levels - 1) * (1 + eps) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        if hard_clamp:
            squashed = (z + offset / half).clamp(-1.0, 1.0)
        else:
            squashed = (z + (offset / half).atanh()).tanh()
        return round_ste(squashed * half - offset) / (self._levels // 2)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Q(z) = 2 / (L - 1) * floor((L - 1) * (tanh(z) + 1) / 2 + 1 / 2) - 1."""
        steps = self._levels - 1
        squashed = z.clamp(-1.0, 1.0) if hard_clamp else z.tanh()
        return 2.0 / steps * floor_ste(steps * (squashed + 1) / 2.0 + 0.5) - 1.0

    def quantize(self, z: Tensor) -> Tensor:
        """z [..., d] at its levels, values in -1..1, with a straight-through gradient."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training shift a share `noise_dropout` of the values by noise of one level's width."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        # Drawn row by row, as in the other library, whatever the strides that a layout left.
        bounded_z = bounded_z.contiguous()
        shifted = torch.full_like(bounded_z, self.noise_dropout).bernoulli_().bool()
        noise = torch.rand_like(bounded_z) - 0.5
        return torch.where(shifted, bounded_z + noise, bounded_z).clamp(-1.0, 1.0)

    def _scale_and_shift(self, values: Tensor) -> Tensor:
        """Values in -1..1 to levels 0..L-1."""
        if self.preserve_symmetry:
            return (values + 1.0) / (2.0 / (self._levels - 1))
        return values * (self._levels // 2) + self._levels // 2

    def _scale_and_shift_inverse(self, levels: Tensor) -> Tensor:
        if self.preserve_symmetry:
            return levels * (2.0 / (self._levels - 1)) - 1.0
        return (levels - self._levels // 2) / (self._levels // 2)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices [...] as the level of each channel [..., d]."""
        return (indices[..., None] // self._basis) % self._levels

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        return self._scale_and_shift_inverse(self.indices_to_level_indices(indices))

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Values [..., d] at their levels as int32 indices [...]."""
        require(zhat.shape[-1] == self.codebook_dim, f"zhat is {list(zhat.shape)}; the last axis must hold {self.codebook_dim}.")
        # Summed as integers: a float32 sum is exact to 2^24 only.
        return (self._scale_and_shift(zhat).round().to(torch.int64) * self._basis).sum(-1).to(torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Output for indices; channels first where indices have spatial axes, as forward takes and returns them."""
        spatial = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        codes = self._indices_to_codes(indices)
        codes = codes @ self.orthogonal_rot.T if self.orthogonal_rotation else codes
        codes = self.project_out(codes.flatten(-2) if self.keep_num_codebooks_dim else codes)
        return codes.movedim(-1, 1) if spatial or self.channel_first else codes

    # -- forward -----------------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z [B, N, dim], or channels first with 4 or more axes or channel_first -> (out like z, int32 indices or None)."""
        first = z.dim() >= 4 or self.channel_first
        inner = self.project_in(_layout.channels_last(z, self.dim, channel_first=first, spatial=None))
        inner = inner.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        inner = inner @ self.orthogonal_rot if self.orthogonal_rotation else inner
        with full_precision(z, self.force_quantization_f32):
            wide = inner.float() if self.force_quantization_f32 and inner.dtype not in self.allowed_dtypes else inner
            codes = self.quantize(wide)
            indices = self.codes_to_indices(codes.detach()) if self.return_indices else None
            codes = self.maybe_apply_noise(codes)
            codes = codes @ self.orthogonal_rot.T if self.orthogonal_rotation else codes
            codes = codes.flatten(-2).to(inner.dtype)
        out = _layout.channels_back(self.project_out(codes), z, first)
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices[..., 0]
        return out, indices

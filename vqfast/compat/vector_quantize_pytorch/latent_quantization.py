"""`LatentQuantize` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import straight_through
from vqfast.compat.vector_quantize_pytorch._helpers import pack as pack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._helpers import unpack as unpack_one  # noqa: F401


class LatentQuantize(nn.Module):
    """Every channel takes the nearest of its own few learnable values.

    State dict: `values_per_latent.{i}` with optimize_values, `project_in.*` and `project_out.*` with a projection.

    Source: Hsu et al. 2023 (arXiv 2305.18378).
    """

    def __init__(
        self,
        levels: Sequence[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
    ):
        super().__init__()
        require(not isinstance(levels, int) or codebook_dim > 0, "one number of levels for all channels needs codebook_dim.")
        levels = [levels] * codebook_dim if isinstance(levels, int) else list(levels)
        self.dim, self.num_codebooks = dim, num_codebooks
        weights = {"commitment_loss_weight": commitment_loss_weight or 0.0, "quantization_loss_weight": quantization_loss_weight or 0.0}
        for name, weight in weights.items():
            self.register_buffer(name, torch.tensor(weight, dtype=torch.float32), persistent=False)
        self._weighs = tuple(map(bool, weights.values()))  # known without asking the device
        self.codebook_dim = codebook_dim if codebook_dim > 0 else len(levels)
        require(self.codebook_dim == len(levels), f"levels has {len(levels)} entries, codebook_dim is {codebook_dim}.")
        self.keep_num_codebooks_dim = keep_num_codebooks_dim or num_codebooks > 1
        counts = torch.tensor(levels, dtype=torch.int32)
        self.register_buffer("_levels", counts, persistent=False)
        self.register_buffer("_basis", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.has_projections = dim != self.effective_codebook_dim
        self.project_in = nn.Linear(dim, self.effective_codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.effective_codebook_dim, dim) if self.has_projections else nn.Identity()
        self.codebook_size = int(counts.prod())
        codebook = self._scale_and_shift_inverse(self._level_indices(torch.arange(self.codebook_size)))
        self.register_buffer("implicit_codebook", codebook, persistent=False)
        # Zero is among the values, and -1/2 the least of them.
        values = [torch.linspace(-0.5, 0.5, n) if n % 2 else torch.arange(n) / n - 0.5 for n in levels]
        self.optimize_values = bool(optimize_values)
        self.values_per_latent = nn.ParameterList(map(nn.Parameter, values)) if optimize_values else values
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None and optimize_values:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self.values_per_latent)

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """(z - sg[zhat])^2."""
        return F.mse_loss(zhat.detach(), z, reduction=reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """(sg[z] - zhat)^2."""
        return F.mse_loss(z.detach(), zhat, reduction=reduce)

    def _nearest_values(self, z: Tensor) -> Tensor:
        """The nearest value of every channel, [..., d]; differentiable in the values, ties to the lowest."""
        out = []
        for channel, values in zip(z.unbind(-1), self.values_per_latent, strict=True):
            values = values.to(z.device)
            out.append(values[(channel.detach()[..., None] - values.detach()).abs().argmin(-1)])
        return torch.stack(out, -1)

    def quantize(self, z: Tensor) -> Tensor:
        """z [..., d] at its values, with a straight-through gradient."""
        return straight_through(z, self._nearest_values(z).to(z.dtype))

    def _scale_and_shift(self, values: Tensor) -> Tensor:
        """Values in -1/2..1/2 to levels."""
        half = self._levels // 2
        return values * 2 * half + half

    def _scale_and_shift_inverse(self, levels: Tensor) -> Tensor:
        half = self._levels // 2
        return (levels - half) / half / 2

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Values [..., d] at their starting levels as int32 indices [...]."""
        require(zhat.shape[-1] == self.codebook_dim, f"zhat is {list(zhat.shape)}; the last axis must hold {self.codebook_dim}.")
        return (self._scale_and_shift(zhat).round().to(torch.int64) * self._basis).sum(-1).to(torch.int32)

    def _level_indices(self, indices: Tensor) -> Tensor:
        return (indices[..., None] // self._basis) % self._levels

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Output for indices [B, ...], channels first."""
        codes = self._scale_and_shift_inverse(self._level_indices(indices))
        codes = codes.flatten(-2) if self.keep_num_codebooks_dim else codes
        return (self.project_out(codes) if project_out else codes).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, dim, ...] -> (out like z, int32 indices [B, ...], with a last axis of codebooks where kept, loss [])."""
        inner = self.project_in(_layout.channels_last(z, self.dim, channel_first=True, spatial=None))
        inner = inner.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.in_place_codebook_optimizer is not None and self.training:
            with torch.enable_grad():
                F.mse_loss(self._nearest_values(inner.detach()), inner.detach()).backward(inputs=list(self.values_per_latent))
            self.in_place_codebook_optimizer.step()
            self.in_place_codebook_optimizer.zero_grad()
        codes = self.quantize(inner)
        indices = self.codes_to_indices(codes.detach())
        out = _layout.channels_back(self.project_out(codes.flatten(-2)), z, True)
        loss = torch.zeros_like(self.commitment_loss_weight)
        if self.training and z.numel() > 0:
            terms = (self.commitment_loss_weight, self.commitment_loss), (self.quantization_loss_weight, self.quantization_loss)
            for (weight, term), weighs in zip(terms, self._weighs, strict=True):
                loss = loss + weight * term(z, out) if weighs else loss
        return out, indices if self.keep_num_codebooks_dim else indices[..., 0], loss

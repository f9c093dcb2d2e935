"""`FSP` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import straight_through
from vqfast.compat.vector_quantize_pytorch._helpers import first_given as default  # noqa: F401

# Standard deviation of the uniform distribution on 0..1, by which activations become values of variance 1.
_UNIFORM_STD = 1 / math.sqrt(12)


# ---- distribution functions, from the real line to 0..1, and their inverses ----------------------------------------------------


def tanh_act(z: Tensor) -> Tensor:
    return (z.tanh() + 1.0) / 2.0


def tanh_inv_act(p: Tensor) -> Tensor:
    return (p * 2.0 - 1.0).arctanh()


def sigmoid_act(z: Tensor) -> Tensor:
    return z.sigmoid()


def sigmoid_inv_act(p: Tensor) -> Tensor:
    return p.logit()


def normal_act(z: Tensor) -> Tensor:
    return (1.0 + (z / math.sqrt(2.0)).erf()) / 2.0


def normal_inv_act(p: Tensor) -> Tensor:
    return (2.0 * p - 1.0).erfinv() * math.sqrt(2.0)


def laplace_act(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + z.sign() * (1.0 - (-z.abs()).exp()))


def laplace_inv_act(p: Tensor) -> Tensor:
    return -(p - 0.5).sign() * (1.0 - 2.0 * (p - 0.5).abs()).log()


def cauchy_act(z: Tensor) -> Tensor:
    return z.arctan() / math.pi + 0.5


def cauchy_inv_act(p: Tensor) -> Tensor:
    return ((p - 0.5) * math.pi).tan()


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (tanh_act, tanh_inv_act),
    "sigmoid": (sigmoid_act, sigmoid_inv_act),
    "normal": (normal_act, normal_inv_act),
    "laplace": (laplace_act, laplace_inv_act),
    "cauchy": (cauchy_act, cauchy_inv_act),
}


def build_cdf_act(act_name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The distribution function of this name, and its inverse."""
    require(act_name in _ACTIVATIONS, f"act_name {act_name!r} is not known; use one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[act_name]


def batch_stats(batch: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, variance, skewness, excess kurtosis) of each channel of batch [N, D]."""
    variance, mean = torch.var_mean(batch, dim=0, correction=1)
    score = (batch - mean) / variance.sqrt().clamp(min=eps)
    return mean, variance, score.pow(3).mean(0), score.pow(4).mean(0) - 3.0


class VectorNorm(nn.Module):
    """Loss that draws the first four moments of every channel to targets."""

    def __init__(
        self,
        l1_target: float = 0.0,
        l1_weight: float = 0.1,
        l2_target: float = 1.0,
        l2_weight: float = 0.07,
        l3_target: float = 0.0,
        l3_weight: float = 0.06,
        l4_target: float = 0.0,
        l4_weight: float = 0.05,
        eps: float = 1e-8,
    ):
        super().__init__()
        self.l1_target, self.l2_target, self.l3_target, self.l4_target = l1_target, l2_target, l3_target, l4_target
        self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight = l1_weight, l2_weight, l3_weight, l4_weight
        self.eps = eps

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """z [N, D] -> (loss [], the moments by name [D])."""
        moments = batch_stats(z, self.eps)
        targets = (self.l1_target, self.l2_target, self.l3_target, self.l4_target)
        weights = (self.l1_weight, self.l2_weight, self.l3_weight, self.l4_weight)
        loss = sum(((m - t) ** 2).mean() * w for m, t, w in zip(moments, targets, weights, strict=True))
        return loss, dict(zip(("mean", "variance", "skewness", "kurtosis"), moments, strict=True))

    @classmethod
    def build(cls, name: str) -> VectorNorm:
        """One of the named settings: none; var (unit variance); kurt (all four moments); var_<activation>."""
        variances = {"var": 1.0, "var_tanh": 0.8225, "var_sigmoid": 3.29, "var_laplace": 2.0}
        require(name in ("none", "kurt", *variances), f"vector_norm {name!r} is not known; use none, kurt, {', '.join(variances)}.")
        if name == "none":
            return cls(l1_weight=0.0, l2_weight=0.0, l3_weight=0.0, l4_weight=0.0)
        return cls() if name == "kurt" else cls(l2_target=variances[name], l3_weight=0.0, l4_weight=0.0)


class FSP(nn.Module):
    """Finite scalar perturbation: channels are mapped to 0..1 and put at the middle of a bin, or in training moved within one.

    State dict: `project_in.*`, `project_out.*` with a projection. Source: arXiv 2602.17133.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        act_name: str = "tanh",
        quantize_rate: float = 0.0,
        need_inv_act: bool = False,
        vector_norm: str = "var_tanh",
    ):
        super().__init__()
        require(0.0 <= quantize_rate <= 1.0, f"quantize_rate must lie in 0..1, got {quantize_rate}.")
        levels = list(levels)
        self.codebook_dim = len(levels)
        self.dim, self.channel_first = self.codebook_dim if dim is None else dim, channel_first
        counts = torch.tensor(levels, dtype=torch.int32)
        self.register_buffer("_levels", counts, persistent=False)
        self.register_buffer("_basis", torch.tensor([1, *levels[:-1]]).cumprod(0, dtype=torch.int32), persistent=False)
        self.codebook_size = int(counts.prod())
        self.has_projections = self.dim != self.codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.codebook_dim, self.dim, bias=projection_has_bias)
        self.act_name, self.need_inv_act, self.quantize_rate = act_name, need_inv_act, quantize_rate
        self.act_func, self.inv_act_func = build_cdf_act(act_name)
        self.vector_norm = VectorNorm.build(vector_norm)

    def __repr__(self) -> str:
        names = ("codebook_size", "codebook_dim", "dim", "act_name", "need_inv_act", "quantize_rate")
        lines = [f"levels={self._levels.tolist()}", *(f"{name}={getattr(self, name)!r}" for name in names)]
        return "FSP(\n  " + ",\n  ".join(lines) + "\n)"

    def quantize_act_value(self, act_z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Activations in 0..1 at the middle of their bin, straight through, and the bins."""
        bins = (act_z.detach().clamp(max=1.0 - eps) * self._levels).floor()
        return straight_through(act_z, ((bins + 0.5) / self._levels).to(act_z.dtype)), bins

    def level_indices_to_indices(self, level_indices: Tensor) -> Tensor:
        """Bins [..., d] as int32 indices [...]."""
        return (level_indices.to(torch.int64) * self._basis).sum(-1).to(torch.int32)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Indices [...] as bins [..., d]."""
        return (indices[..., None] // self._basis) % self._levels

    def indices_to_act_value(self, indices: Tensor) -> Tensor:
        """The middles of the bins of indices, in 0..1."""
        return (self.indices_to_level_indices(indices).float() + 0.5) / self._levels

    def indices_to_codes(self, indices: Tensor, eps: float = 1e-6) -> Tensor:
        """Output for indices [B, ...], in the layer's layout."""
        value = self.indices_to_act_value(indices)
        codes = self.inv_act_func(value.clamp(eps, 1.0 - eps)) if self.need_inv_act else (value - 0.5) / _UNIFORM_STD
        return _layout.channels_back(self.project_out(codes), indices[..., None], self.channel_first)

    def forward(self, z: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor, dict]:
        """z [..., dim], or [B, dim, ...] with channel_first -> (out like z, int32 indices, moment loss [], facts by name)."""
        eps = eps or torch.finfo(z.dtype).eps
        inner = _layout.channels_last(z, self.dim, channel_first=self.channel_first, spatial=None)
        leading = inner.shape[:-1]
        rows = self.project_in(inner.reshape(-1, self.dim))
        norm_loss, moments = self.vector_norm(rows)
        act = self.act_func(rows)
        value, bins = self.quantize_act_value(act, eps)
        facts = {}
        rate = self.quantize_rate if self.training else 1.0
        if rate < 1.0:
            moved = act + (torch.rand_like(act) * 2.0 - 1.0) / (2 * self._levels)
            inside = (moved > 0.0) & (moved < 1.0)
            facts["p_accept_prob"] = inside.float().mean()
            value = torch.where(torch.rand_like(value) > rate, torch.where(inside, moved, act), value)
        if self.need_inv_act:
            out = straight_through(rows, self.inv_act_func(value.clamp(eps, 1.0 - eps)))
        else:
            out = (value - 0.5) / _UNIFORM_STD
        out = _layout.channels_back(self.project_out(out).reshape(inner.shape), z, self.channel_first)
        facts = {"level_indices": bins.reshape(*leading, -1), "norm_info": moments, **facts}
        return out, self.level_indices_to_indices(bins).reshape(leading), norm_loss, facts

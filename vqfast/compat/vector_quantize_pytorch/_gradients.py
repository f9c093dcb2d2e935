"""How a gradient passes a quantizer: straight through, rotated, or along a noisy direction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops.straight_through import all_finite

# Norms under this do not divide; the value is the other library's.
_EPS = 1e-6


def l2norm(t: Tensor, dim: int = -1, eps: float = _EPS) -> Tensor:
    """t / |t| along an axis; a vector shorter than eps is divided by eps."""
    return F.normalize(t, p=2, dim=dim, eps=eps)


class StraightThrough(torch.autograd.Function):
    """out = target; d out / d source = identity, d out / d target = 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source, target):
        return target.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class RotateTo(torch.autograd.Function):
    """out = target; d out / d source is the rotation and scaling that takes source to target.

    With u = source / |source|, q = target / |target|, w = (u + q) / |u + q| and s = |target| / |source|, all constants:
    out = s (I - 2 w w' + 2 q u') source, so a gradient g becomes s (g - 2 w (w.g) + 2 u (q.g)). Where source or
    target is not finite there is no rotation, and the gradient passes as it is: under a mask it is 0, and stays so.

    Source: Fifty et al. 2024, section 4.2 (arXiv 2410.06424).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(source, target):
        return target.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        source, target = (t.detach() for t in ctx.saved_tensors)
        length, goal = _length(source).clamp(min=_EPS), _length(target)
        scale = goal / length
        u, q = source / length, target / goal.clamp(min=_EPS)
        w = u + q
        w = w / _length(w).clamp(min=_EPS)
        along_w = (w * grad).sum(-1, keepdim=True)
        along_q = (q * grad).sum(-1, keepdim=True)
        rotated = (scale * (grad - 2 * along_w * w + 2 * along_q * u)).to(grad.dtype)
        if all_finite(length + goal):
            return rotated, None
        return torch.where(length.isfinite() & goal.isfinite(), rotated, grad), None


def _length(t: Tensor) -> Tensor:
    if t.stride(-1) == 1:
        return t.norm(dim=-1, keepdim=True)
    # Where the channels come first, norm() takes twenty times as long as this.
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return wide.square().sum(-1, keepdim=True).sqrt().to(t.dtype)


def straight_through(source: Tensor, target: Tensor) -> Tensor:
    """target's values with source's gradient. **Shapes**: both [..., D]."""
    return StraightThrough.apply(source, target.detach())


def rotate_to(source: Tensor, target: Tensor) -> Tensor:
    """target's values; the gradient reaches source rotated (`RotateTo`). **Shapes**: both [..., D]."""
    return RotateTo.apply(source, target.detach())


def directional_reparam(source: Tensor, target: Tensor, noise_variance: float = 5e-3) -> Tensor:
    """source + |target - source| * v, v a unit vector near the direction to target; gradients reach both.

    Source: DiVeQ, figure 1 (openreview KRVnpTbx7R).
    """
    error = target - source
    direction = l2norm(error + math.sqrt(noise_variance) * torch.randn_like(error)).detach()
    return source + direction * error.norm(dim=-1, keepdim=True)

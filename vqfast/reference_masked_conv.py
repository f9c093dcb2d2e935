"""What masked_conv and gate mean, in plain torch: a full convolution with a multiplied mask. Any device, float64
included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TANH, GLU = 0, 1


def causal_mask(weight: Tensor, include_center: bool, maps: int) -> Tensor:
    """The mask of a weight [Cout, Cin, kh, kw]: 1 before the centre in raster order, 0 after it.

    At the centre, outputs of map g see inputs of map h < g, and of h = g when `include_center`. With one map that
    is mask A
    (centre hidden) or B (centre seen). Channels belong to maps in equal consecutive groups.
    """
    out_channels, in_channels, kh, kw = weight.shape
    mask = torch.zeros_like(weight)
    mask[:, :, : kh // 2] = 1
    mask[:, :, kh // 2, : kw // 2] = 1
    out_map = torch.arange(out_channels, device=weight.device) // (out_channels // maps)
    in_map = torch.arange(in_channels, device=weight.device) // (in_channels // maps)
    seen = in_map <= out_map[:, None] if include_center else in_map < out_map[:, None]
    mask[:, :, kh // 2, kw // 2] = seen.to(weight.dtype)
    return mask


def masked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, include_center: bool, dilation: int, maps: int
) -> Tensor:
    """y = conv2d(x, mask * weight) + bias, zero padding that keeps height and width."""
    padding = tuple(dilation * (k // 2) for k in weight.shape[2:])
    return F.conv2d(x, weight * causal_mask(weight, include_center, maps), bias, padding=padding, dilation=dilation)


def masked_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    include_center: bool,
    dilation: int,
    maps: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of masked_conv to x and to weight (zero where masked); an empty tensor for one that is not needed."""
    mask = causal_mask(weight, include_center, maps)
    padding = [dilation * (k // 2) for k in weight.shape[2:]]
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight * mask, None, [1, 1], padding, [dilation] * 2, False, [0, 0], 1, [need_x, need_weight, False]
    )
    # Contiguous, as the fake says: torch may return channels-last gradients.
    return (
        to_x.contiguous() if need_x else x.new_empty(0),
        (to_weight * mask).contiguous() if need_weight else weight.new_empty(0),
    )


def gate(x: Tensor, vector: Tensor | None, kind: int) -> Tensor:
    """(a, b) = halves of x + vector along the channels; tanh(a) sigmoid(b) (TANH) or a sigmoid(b) (GLU)."""
    a, b = _biased(x, vector).chunk(2, dim=1)
    # Contiguous, as the fake says: the input may be channels-last.
    return ((a.tanh() if kind == TANH else a) * b.sigmoid()).contiguous()


def gate_backward(grad: Tensor, x: Tensor, vector: Tensor | None, kind: int) -> Tensor:
    """Gradient of gate to x (its sum over height and width is the gradient to vector)."""
    a, b = _biased(x, vector).chunk(2, dim=1)
    s = b.sigmoid()
    t = a.tanh() if kind == TANH else a
    slope = (1 - t * t) * s if kind == TANH else s
    return torch.cat([grad * slope, grad * t * (s * (1 - s))], dim=1).contiguous()


def _biased(x: Tensor, vector: Tensor | None) -> Tensor:
    return x if vector is None else x + vector[:, :, None, None]

"""masked_conv: causal convolutions that multiply only unmasked taps, and the fused gate of the autoregressive
networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _backends, _border
from vqfast import reference_masked_conv as reference
from vqfast.ops import _shapes

GATES = {"tanh": reference.TANH, "glu": reference.GLU}

# ---- unmasked rectangles -----------------------------------------------------------------------------------
#
#     x x x x x      the rows above the centre: one rectangle, kernel [kh // 2, kw]
#     x x x x x
#     x x c . .      the taps left of the centre and, for mask B, the centre: kernel [1, kw // 2 (+ 1)]
#     . . . . .      with several maps the centre has a channel mask and is a third, 1 x 1 rectangle


def _rectangles(weight: Tensor, include_center: bool, dilation: int, maps: int):
    """Pairs (weight slice, padding left, right, top, bottom): their plain convolutions add up to the masked one."""
    kh, kw = weight.shape[2:]
    up, left = kh // 2, kw // 2
    found = []
    if up:
        found.append((weight[:, :, :up], (dilation * left, dilation * left, dilation * up, -dilation)))
    if include_center and maps == 1:
        found.append((weight[:, :, up : up + 1, : left + 1], (dilation * left, 0, 0, 0)))
    elif left:
        found.append((weight[:, :, up : up + 1, :left], (dilation * left, -dilation, 0, 0)))
    if maps > 1:
        center = weight[:, :, up : up + 1, left : left + 1]
        found.append((center * reference.causal_mask(center, include_center, maps), (0, 0, 0, 0)))
    return found


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding, dilation: int) -> Tensor:
    return F.conv2d(_pad(x, padding), weight, bias, dilation=dilation)


def _pad(x: Tensor, padding) -> Tensor:
    """Zeros left and above; a negative right or bottom cuts columns or rows that no output needs."""
    left, right, top, bottom = padding
    if not any(padding):
        return x
    return F.pad(x, (left, max(right, 0), top, 0))[..., : x.shape[-2] + top + bottom, : x.shape[-1] + left + right]


def _unpad(grad: Tensor, padding, like: Tensor) -> Tensor:
    """The transpose of _pad."""
    left, right, top, bottom = padding
    whole = F.pad(grad, (0, max(-right, 0), 0, -bottom))
    return whole[..., top : top + like.shape[-2], left : left + like.shape[-1]]


def cropped_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, include_center: bool, dilation: int = 1, maps: int = 1
) -> Tensor:
    """masked_conv from plain torch convolutions over the unmasked rectangles, with torch's own autograd."""
    total = None
    for part, padding in _rectangles(weight, include_center, dilation, maps):
        y = _convolve(x, part, None if total is not None else bias, padding, dilation)
        total = y if total is None else total + y
    if total is None:  # a 1 x 1 kernel with mask A sees nothing
        total = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
        total = total if bias is None else total + bias[:, None, None]
    return total


def _cropped_backward(grad, x, weight, include_center, dilation, maps, need_x, need_weight):
    """masked_conv_backward from torch's own gradients of the unmasked rectangles."""
    kh, kw = weight.shape[2:]
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape) if need_weight else weight.new_empty(0)
    for part, padding in _rectangles(weight, include_center, dilation, maps):
        padded = _pad(x, padding)
        to_x, to_part, _ = torch.ops.aten.convolution_backward(
            grad, padded, part, None, [1, 1], [0, 0], [dilation] * 2, False, [0, 0], 1, [need_x, need_weight, False]
        )
        if need_x:
            grad_x += _unpad(to_x, padding, x)
        if need_weight:
            row = slice(0, kh // 2) if padding[2] else slice(kh // 2, kh // 2 + 1)
            center = padding == (0, 0, 0, 0) and maps > 1
            column = slice(kw // 2, kw // 2 + 1) if center else slice(0, part.shape[3])
            if center:
                to_part = to_part * reference.causal_mask(part, include_center, maps)
            grad_weight[:, :, row, column] = to_part
    return grad_x, grad_weight


def _fake(x, weight, bias, include_center, dilation, maps):
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.mask = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = None
    if need_x or need_weight:
        backward = _border.call("masked_conv_backward", _backend_of(grad))
        grad_x, grad_weight = backward(grad, x, weight, *ctx.mask, need_x, need_weight)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad.sum((0, 2, 3)) if ctx.has_bias and need_bias else None,
        *(None,) * 3,
    )


def _backward_fake(grad, x, weight, include_center, dilation, maps, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _backward_setup_context(ctx, inputs, output):
    grad, x, weight, *ctx.mask, ctx.need_x, ctx.need_weight = inputs
    ctx.save_for_backward(grad, x, weight)


def _second_backward(ctx, to_x, to_weight):
    """Gradient of both gradients: each is linear in its two arguments, so their transposes are the same ops again."""
    grad, x, weight = ctx.saved_tensors
    backend = _backend_of(grad)
    forward, backward = _border.call("masked_conv", backend), _border.call("masked_conv_backward", backend)
    to_grad = grad_x = grad_weight = None
    if ctx.need_x:
        to_grad = forward(to_x, weight, None, *ctx.mask)
        grad_weight = backward(grad, to_x, weight, *ctx.mask, False, True)[1]
    if ctx.need_weight:
        more = forward(x, to_weight, None, *ctx.mask)
        to_grad = more if to_grad is None else to_grad + more
        grad_x = backward(grad, x, to_weight, *ctx.mask, True, False)[0]
    return to_grad, grad_x, grad_weight, *(None,) * 5


_border.define(
    "masked_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool include_center, int dilation, int maps, bool need_x, bool need_weight)"
    " -> (Tensor, Tensor)",
    family="masked_conv",
    reference=reference.masked_conv_backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_second_backward,
)
# The native library has no gradient kernels: on the CPU torch's own over the unmasked rectangles are fast.
_border.implement("masked_conv_backward", "cpu", _cropped_backward)
_border.define(
    "masked_conv",
    "(Tensor x, Tensor weight, Tensor? bias, bool include_center, int dilation, int maps) -> Tensor",
    family="masked_conv",
    reference=reference.masked_conv,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


@_border.bound_once
class MaskedConv(torch.autograd.Function):
    """masked_conv with the gradients of its unmasked rectangles; masked weights get gradient zero."""

    @staticmethod
    def forward(x, weight, bias, include_center, dilation, maps, backend):
        return _border.call("masked_conv", backend)(x, weight, bias, include_center, dilation, maps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_context(ctx, inputs[:6], output)

    @staticmethod
    def backward(ctx, grad):
        return *_backward(ctx, grad), None


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str = "B",
    dilation: int = 1,
    maps: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Causal convolution: y[i, j] = bias + sum over taps before (i, j) in raster order, and itself for mask B.

    Only unmasked taps are multiplied: 5 of 9 for a 3 x 3 kernel with mask B, 24 of 49 for 7 x 7 with mask A.

    **Shapes**: x [B, Cin, H, W], weight [Cout, Cin, kh, kw] (kh, kw odd), bias [Cout] -> [B, Cout, H, W].

    Args:
        x: float16, bfloat16, float32 or float64.
        weight: full-size kernel, same dtype; its masked entries are not read and get gradient zero.
        bias: same dtype, or None.
        mask: "A" hides the centre, "B" shows it. With several maps only the centre's own map is meant: map g
        always sees
            the earlier maps h < g of its own position.
        dilation: distance between taps.
        maps: code maps whose channels stand in equal consecutive groups, in the order in which they are generated.
        backend: see `nearest`.

    Returns:
        Tensor of x's dtype.

    Raises:
        ValueError, TypeError: rank, channels, kernel size, mask, dtype or device do not fit.

    Gradient: to x, weight and bias, and once more to these; a masked weight's is zero.
    Numerics: the cpu backend sums each output in one float32 chain of fused multiply-adds over (tap, channel)
    ascending, and so does cuda (half precision on tensor cores); triton in blocks of channels, in float32 without
    TF32.
    Source: van den Oord et al. 2016 (1601.06759, section 3; 1606.05328, section 2.3).
    """
    _check(x, weight, bias, mask, dilation, maps)
    chosen = _backends.choose("masked_conv", backend, x)
    if chosen == "cpu" and x.dtype != torch.float32:
        wide = [t if t is None else t.float() for t in (x, weight, bias)]
        return _apply(*wide, mask == "B", dilation, maps, chosen).to(x.dtype)
    return _apply(x, weight, bias, mask == "B", dilation, maps, chosen)


def _backend_of(grad: Tensor) -> str:
    """Who computes a gradient; the native library computes in float32 only."""
    chosen = _backends.choose("masked_conv", None, grad)
    return "reference" if chosen == "cpu" and grad.dtype != torch.float32 else chosen


def _apply(x, weight, bias, include_center, dilation, maps, backend):
    if torch.compiler.is_compiling():
        return _border.call("masked_conv", backend)(x, weight, bias, include_center, dilation, maps)
    return MaskedConv.apply(x, weight, bias, include_center, dilation, maps, backend)


def _check(x, weight, bias, mask, dilation, maps) -> None:
    both = f"x is {_shapes.describe(x)}, weight is {_shapes.describe(weight)}"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{both}: x must be [B, Cin, H, W] and weight [Cout, Cin, kh, kw] with the same Cin.")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"{both}: a masked kernel has a centre, so its height and width must be odd.")
    if mask not in ("A", "B"):
        raise ValueError(f'mask is {mask!r}; use "A" (centre hidden, first layer) or "B" (centre seen, later layers).')
    if dilation < 1 or maps < 1 or weight.shape[0] % maps or weight.shape[1] % maps:
        raise ValueError(
            f"{both}, dilation {dilation}, maps {maps}: both must be at least 1, and maps must divide Cin and Cout."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight is {_shapes.describe(weight)}, bias is {_shapes.describe(bias)}: bias must be [Cout]."
        )
    if not x.is_floating_point() or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        raise TypeError(f"{both}: x, weight and bias must share one floating dtype; cast one of them.")
    if any(t is not None and t.device != x.device for t in (weight, bias)):
        raise ValueError(f"{both}: all must be on one device.")


# ---- gate --------------------------------------------------------------------------------------------------


def _gate_fake(x, vector, kind):
    return x.new_empty(x.shape[0], x.shape[1] // 2, *x.shape[2:])


def _gate_setup_context(ctx, inputs, output):
    x, vector, ctx.kind = inputs
    ctx.save_for_backward(x, vector)


def _gate_backward(ctx, grad):
    x, vector = ctx.saved_tensors
    to_x = _border.call("gate_backward", _backend_of(x))(grad, x, vector, ctx.kind)
    return to_x, None if vector is None else to_x.sum((2, 3)), None


_border.define(
    "gate_backward",
    "(Tensor grad, Tensor x, Tensor? vector, int kind) -> Tensor",
    family="masked_conv",
    reference=reference.gate_backward,
    fake=lambda grad, x, vector, kind: x.new_empty(x.shape),
)
_border.define(
    "gate",
    "(Tensor x, Tensor? vector, int kind) -> Tensor",
    family="masked_conv",
    reference=reference.gate,
    fake=_gate_fake,
    setup_context=_gate_setup_context,
    backward=_gate_backward,
)


@_border.bound_once
class Gate(torch.autograd.Function):
    """gate with one fused backward pass; it saves its input only, not the two activations."""

    @staticmethod
    def forward(x, vector, kind, backend):
        return _border.call("gate", backend)(x, vector, kind)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _gate_setup_context(ctx, inputs[:3], output)

    @staticmethod
    def backward(ctx, grad):
        return *_gate_backward(ctx, grad), None


def gated_activation(
    x: Tensor, vector: Tensor | None = None, *, kind: str = "tanh", backend: str | None = None
) -> Tensor:
    """tanh(a) * sigmoid(b), or a * sigmoid(b), where (a, b) are the halves of x + vector along the channels.

    **Shapes**: x [B, 2 C, H, W], vector [B, 2 C] (a bias per picture, from its class for example) -> [B, C, H, W].

    Args:
        x: any floating dtype.
        vector: same dtype, or None.
        kind: "tanh" (Gated PixelCNN) or "glu" (PixelSNAIL).
        backend: see `nearest`.

    Returns:
        Tensor of x's dtype, contiguous.

    Raises:
        ValueError: odd channels, a vector that does not fit, an unknown kind.

    Gradient: to x and vector, in one pass; the activations are recomputed rather than saved.
    Source: van den Oord et al. 2016 (1606.05328), eq. 2; Chen et al. 2017 (1712.09763).
    """
    if x.dim() != 4 or x.shape[1] % 2 or (vector is not None and vector.shape != x.shape[:2]):
        shape = "None" if vector is None else _shapes.describe(vector)
        raise ValueError(
            f"x is {_shapes.describe(x)}, vector is {shape}: they must be [B, 2 C, H, W] and [B, 2 C] or None."
        )
    if kind not in GATES:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(GATES)}.")
    chosen = _backends.choose("masked_conv", backend, x)
    if chosen == "cpu" and x.dtype != torch.float32:
        wide = [t if t is None else t.float() for t in (x, vector)]
        return gated_activation(*wide, kind=kind, backend=chosen).to(x.dtype)
    if torch.compiler.is_compiling():
        return _border.call("gate", chosen)(x, vector, GATES[kind])
    return Gate.apply(x, vector, GATES[kind], chosen)

"""masked_conv on Triton: implicit matrix products over the unmasked taps, which are the first ones in raster order; and the gate.

    x --pack--> channels last, zero margins --conv--> y          one program owns [BLOCK_M positions, BLOCK_N channels] of y
    grad --pack--> the same, margin below --conv, taps reversed, weights transposed--> grad_x
    both --weight_grad--> partial sums over runs of positions --sum--> grad_weight

    . . . . . .      A picture of 3 x 2 in the buffer of a 3 x 3 kernel: one row of zeros above (grad: below), one column on each side, so
    . . . . . .      that no tap needs a mask and channels, the summed axis, are contiguous. It costs one more pass over x: 2 bytes moved
    . . x x . .      per byte of x, against 2 * taps * Cout operations per element.

Sums are float32 in a fixed order: taps and blocks of channels ascending; over positions, fixed runs, added in order. Nothing here depends on
timing, so the bits are the same every time. Float32 products are float32's own (no TF32).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._cast import _as
from ._triton import cdiv, interpreted, on_device

# Numbers that change with the batch or the map are never specialized: a new size compiles nothing new. Lines and pictures are counted
# with a pitch, their length rounded up to 16: the compiler then knows that 16 neighbours lie side by side and gives them to neighbouring
# threads. Without it, which axis of a tile comes first is a guess, and another one in another version of Triton.
PITCH = 16


@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_h", "C", "H", "W", "top", "tall", "lines"])
def _pack_kernel(
    x, stride_b, stride_c, stride_h, stride_w, C, H, W, top, side, tall, lines, pitch, out, out_channels,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[b, i + top, j + side, c] = x[b, c, i, j], zero elsewhere: BLOCK_P positions of the B * tall lines, BLOCK_C channels."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    wide = W + 2 * side
    line = at // pitch
    j = at - line * pitch
    there = (line < lines) & (j < wide)
    b = line // tall
    i = line - b * tall - top
    inside = there & (i >= 0) & (i < H) & (j >= side) & (j < W + side)
    pixel = x + b * stride_b + i * stride_h + (j - side) * stride_w
    value = tl.load(pixel[None, :] + c[:, None] * stride_c, mask=inside[None, :] & (c < C)[:, None], other=0.0)
    pointers = out + (line * wide + j)[None, :] * out_channels + c[:, None]
    tl.store(pointers, value.to(out.dtype.element_ty), mask=there[None, :] & (c < out_channels)[:, None])


@triton.jit(do_not_specialize=["W", "per_picture", "tall", "pictures"])
def _conv_kernel(
    x, weight, bias, out, W, per_picture, pitch, tall, pictures, in_channels, out_channels, columns, dilation,
    TAPS: tl.constexpr, UP: tl.constexpr, KW: tl.constexpr, REVERSED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, n, i, j] = bias[n] + sum over taps t and channels c of weight[t, n, c] x[b, i + dilation ty, j + dilation tx, c].

    x is packed [B, tall, W + 2 side, Cin], weight [TAPS, Cin, columns], Cin a multiple of BLOCK_K; out [B, Cout, H, W] contiguous. Per
    program: 2 TAPS Cin BLOCK_M BLOCK_N operations on TAPS Cin (BLOCK_M + BLOCK_N) loaded elements. REVERSED reads at
    (UP - ty, KW - 1 - tx) instead, for the gradient to x. Weights are contiguous along n: a warp of a float32 product holds 64 columns and
    8 rows, so columns must lie side by side in shared memory, or their reads fall on the same banks.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = r // pitch
    p = r - b * pitch
    valid = (b < pictures) & (p < per_picture)
    read_b = tl.minimum(b, pictures - 1)
    read_p = tl.minimum(p, per_picture - 1)
    i = read_p // W
    wide = tl.cast(W, tl.int64) + dilation * (KW - 1)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + ((read_b * tall + i) * wide + read_p - i * W)[:, None] * in_channels + k[None, :]  # [BLOCK_M, BLOCK_K]
    w_tile = weight + k[:, None] * columns + n[None, :]  # [BLOCK_K, BLOCK_N]
    chunks = in_channels // BLOCK_K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, TAPS * chunks):  # one loop, so that loads of the next tap overlap with products of this one
        tap = step // chunks
        first = (step - tap * chunks) * BLOCK_K
        ty = tap // KW
        tx = tap - ty * KW
        if REVERSED:
            ty = UP - ty
            tx = KW - 1 - tx
        moved = (ty * wide + tx) * dilation * in_channels + first
        w = tl.load(w_tile + tl.cast(step, tl.int64) * BLOCK_K * columns)
        total = tl.dot(tl.load(x_tile + moved), w, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < out_channels, other=0.0).to(tl.float32)[None, :]
    pointers = out + (b * out_channels * per_picture + p)[:, None] + n[None, :] * per_picture
    tl.store(pointers, _as(total, out.dtype.element_ty), mask=valid[:, None] & (n < out_channels)[None, :])


@triton.jit(do_not_specialize=["wide", "positions", "per_run"])
def _weight_grad_kernel(
    grad, x, partial, wide, positions, per_run, out_channels, in_channels, dilation,
    TAPS: tl.constexpr, KW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[run, t, n, m] = sum over one run of positions q of grad[q + side, n] x[q + dilation (ty wide + tx), m].

    Both are packed with the same margins, grad's below and x's above, so that a tap is one shift for all positions, the margins between
    pictures included: grad is zero there. No division, no mask but the end of the run.
    """
    tiles = tl.cdiv(in_channels, BLOCK_M)
    tile = tl.program_id(0).to(tl.int64)
    n = tile // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = tl.program_id(1).to(tl.int64)
    run = tl.program_id(2).to(tl.int64)
    begin = run * per_run
    end = tl.minimum(begin + per_run, positions)
    some_n = (n < out_channels)[:, None]
    some_m = (m < in_channels)[None, :]
    grad += dilation * (KW // 2) * out_channels
    x += (tap // KW * wide + tap % KW) * dilation * in_channels
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_K):
        q = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = q < end
        g = tl.load(grad + q[None, :] * out_channels + n[:, None], mask=inside[None, :] & some_n, other=0.0)
        value = tl.load(x + q[:, None] * in_channels + m[None, :], mask=inside[:, None] & some_m, other=0.0)
        total = tl.dot(g, value, total, input_precision="ieee")
    at = (run * TAPS + tap) * out_channels
    tl.store(partial + (at + n)[:, None] * in_channels + m[None, :], total, mask=some_n & some_m)


# ---- host ------------------------------------------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    """What a causal kernel reads: TAPS taps in raster order, dilation apart, UP rows above the centre."""

    taps: int
    up: int
    width: int
    dilation: int

    @property
    def above(self) -> int:
        return self.dilation * self.up

    @property
    def side(self) -> int:
        return self.dilation * (self.width // 2)


def _geometry(weight: Tensor, include_center: bool, dilation: int, maps: int) -> _Geometry:
    kh, kw = weight.shape[2:]
    return _Geometry(kh // 2 * kw + kw // 2 + (include_center or maps > 1), kh // 2, kw, dilation)


def _product_type(x: Tensor) -> torch.dtype:
    """Type of the packed operands: x's own, but Triton's interpreter cannot multiply bfloat16."""
    return torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype


def _pack(x: Tensor, shape: _Geometry, top: int) -> Tensor:
    """x [B, C, H, W], any strides -> [B, above + H, side + W + side, channels], channels padded with zeros, `top` rows of zeros first."""
    b, c, h, w = x.shape
    block = _tuning.conv_channels(c, x.dtype)
    out = torch.empty(
        (b, h + shape.above, w + 2 * shape.side, cdiv(c, block) * block), dtype=_product_type(x), device=x.device
    )
    lines, pitch, tile = b * out.shape[1], cdiv(out.shape[2], PITCH) * PITCH, _tuning.PACK
    _pack_kernel[(cdiv(lines * pitch, tile["BLOCK_P"]), cdiv(out.shape[3], tile["BLOCK_C"]))](
        x, *x.stride(), c, h, w, top, shape.side, out.shape[1], lines, pitch, out, out.shape[3], **tile
    )
    return out


def _center(part: Tensor, include_center: bool, maps: int) -> Tensor:
    """part [Cout, Cin] of the centre tap with zeros where a map may not see another; masked values are not read."""
    out_map, in_map = (torch.arange(n, device=part.device) // (n // maps) for n in part.shape)
    seen = in_map <= out_map[:, None] if include_center else in_map < out_map[:, None]
    return torch.where(seen, part, 0.0)


def _conv(packed: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, shape: _Geometry, reversed_taps: bool) -> None:
    """packed as by _pack, weight [TAPS, K, N] -> out [B, N, H, W]."""
    b, n, h, w = out.shape
    tile = _tuning.conv(n, weight.shape[1], packed.dtype)
    columns = cdiv(n, tile["BLOCK_N"]) * tile["BLOCK_N"]
    padded = torch.zeros((shape.taps, packed.shape[3], columns), dtype=packed.dtype, device=packed.device)
    padded[:, : weight.shape[1], :n] = weight
    pitch = cdiv(h * w, PITCH) * PITCH
    _conv_kernel[(cdiv(b * pitch, tile["BLOCK_M"]), columns // tile["BLOCK_N"])](
        packed, padded, out if bias is None else bias.contiguous(), out, w, h * w, pitch, packed.shape[1], b, packed.shape[3], n, columns,
        shape.dilation, TAPS=shape.taps, UP=shape.up, KW=shape.width, REVERSED=reversed_taps, BIAS=bias is not None, **tile,
    )  # fmt: skip


def _taps(weight: Tensor, shape: _Geometry, include_center: bool, maps: int) -> Tensor:
    """weight [Cout, Cin, kh, kw] -> [TAPS, Cout, Cin]."""
    taps = weight.flatten(2)[..., : shape.taps].permute(2, 0, 1)
    if maps == 1:
        return taps
    return torch.cat([taps[:-1], _center(taps[-1], include_center, maps)[None]])


def masked_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, include_center: bool, dilation: int, maps: int
) -> Tensor:
    """x [B, Cin, H, W], weight [Cout, Cin, kh, kw] -> [B, Cout, H, W] contiguous, of x's dtype."""
    out = torch.empty((x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device)
    if out.numel():
        shape = _geometry(weight, include_center, dilation, maps)
        with on_device(x):
            taps = _taps(weight, shape, include_center, maps)
            _conv(_pack(x, shape, shape.above), taps.transpose(1, 2), bias, out, shape, False)
    return out


def _weight_grad(grad: Tensor, x: Tensor, height: int, width: int, shape: _Geometry) -> Tensor:
    """Both packed, [B, tall, wide, channels] -> [TAPS, Cout, Cin] float32, channels padded."""
    b, tall, wide, n = grad.shape
    m = x.shape[3]
    tile = _tuning.conv_weight_grad(n, m, x.dtype)
    tiles = cdiv(n, tile["BLOCK_N"]) * cdiv(m, tile["BLOCK_M"])
    positions = ((b - 1) * tall + height - 1) * wide + width  # up to the last pixel, margins in between included
    # Enough runs to fill a large GPU, whatever the device: the bits then depend on the shape alone.
    runs = max(1, min(cdiv(positions, 1024), _tuning.CONV_PROGRAMS // (tiles * shape.taps)))
    per_run = cdiv(cdiv(positions, runs), tile["BLOCK_K"]) * tile["BLOCK_K"]
    partial = torch.empty((cdiv(positions, per_run), shape.taps, n, m), dtype=torch.float32, device=x.device)
    _weight_grad_kernel[(tiles, shape.taps, partial.shape[0])](
        grad, x, partial, wide, positions, per_run, n, m, shape.dilation, TAPS=shape.taps, KW=shape.width, **tile
    )
    return partial.sum(0)


def masked_conv_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, include_center: bool, dilation: int, maps: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """grad [B, Cout, H, W] -> gradients to x and to weight, contiguous; an empty tensor for one that is not needed."""
    grad_x = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    grad_weight = torch.zeros(weight.shape if need_weight else 0, dtype=weight.dtype, device=x.device)
    shape = _geometry(weight, include_center, dilation, maps)
    if not grad.numel() or not (need_x or need_weight):
        return grad_x, grad_weight
    with on_device(x):
        packed = _pack(grad, shape, 0)
        if need_x:
            taps = _taps(weight, shape, include_center, maps)
            _conv(packed, taps, None, grad_x, shape, True)
        if need_weight and shape.taps:
            total = _weight_grad(packed, _pack(x, shape, shape.above), *x.shape[2:], shape)
            total = total[:, : weight.shape[0], : weight.shape[1]].permute(1, 2, 0).to(weight.dtype)
            grad_weight.flatten(2)[..., : shape.taps] = total
            if maps > 1:
                grad_weight.flatten(2)[..., shape.taps - 1] = _center(total[..., -1], include_center, maps)
    return grad_x, grad_weight


# ---- gate ------------------------------------------------------------------------------------------------------------------

TANH = tl.constexpr(0)
_GATE_SIZES = ["stride_b", "stride_c", "P", "tiles_c", "tiles_p"]


@triton.jit
def _tanh(a):
    """(1 - e) / (1 + e) with e = exp(-2 |a|): never overflows; off by a few 2^-24."""
    e = tl.exp(-2.0 * tl.abs(a))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.0, -t, t)


@triton.jit
def _sigmoid(b):
    e = tl.exp(-tl.abs(b))
    return tl.where(b < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _gate_tile(P, C, tiles_c, tiles_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """-> picture, channels [BLOCK_C, 1], positions [1, BLOCK_P], which of them exist. One axis of programs: it may be long."""
    tile = tl.program_id(0).to(tl.int64)
    b = tile // (tiles_c * tiles_p)
    rest = tile - b * tiles_c * tiles_p
    c = (rest // tiles_p * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    p = (rest % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    return b, c, p, (c < C) & (p < P)


@triton.jit
def _gate_halves(x, stride_b, stride_c, stride_p, vector, b, c, p, inside, C, VECTOR: tl.constexpr):
    """The halves (a, b) of x + vector, [BLOCK_C, BLOCK_P] float32."""
    at = x + b * stride_b + c * stride_c + p * stride_p
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + C * stride_c, mask=inside, other=0.0).to(tl.float32)
    if VECTOR:
        first += tl.load(vector + 2 * b * C + c, mask=c < C, other=0.0).to(tl.float32)
        second += tl.load(vector + (2 * b + 1) * C + c, mask=c < C, other=0.0).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=_GATE_SIZES)
def _gate_kernel(
    x, stride_b, stride_c, stride_p, vector, out, C, P, tiles_c, tiles_p,
    KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[b, c, p] = f(a) sigmoid(b), (a, b) = x[b, c, p], x[b, C + c, p] plus vector: x read once, out written once."""
    b, c, p, inside = _gate_tile(P, C, tiles_c, tiles_p, BLOCK_C, BLOCK_P)
    first, second = _gate_halves(x, stride_b, stride_c, stride_p, vector, b, c, p, inside, C, VECTOR)
    if KIND == TANH:
        first = _tanh(first)
    tl.store(out + (b * C + c) * P + p, _as(first * _sigmoid(second), out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_GATE_SIZES, "grad_stride_b", "grad_stride_c"])
def _gate_backward_kernel(
    grad, grad_stride_b, grad_stride_c, grad_stride_p,
    x, stride_b, stride_c, stride_p, vector, out, C, P, tiles_c, tiles_p,
    KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[b, c, p] and out[b, C + c, p]: the gate's gradient to both halves; the activations are computed again, not read."""
    b, c, p, inside = _gate_tile(P, C, tiles_c, tiles_p, BLOCK_C, BLOCK_P)
    first, second = _gate_halves(x, stride_b, stride_c, stride_p, vector, b, c, p, inside, C, VECTOR)
    g = tl.load(grad + b * grad_stride_b + c * grad_stride_c + p * grad_stride_p, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(second)
    slope = s
    if KIND == TANH:
        first = _tanh(first)
        slope = (1.0 - first * first) * s
    at = out + (2 * b * C + c) * P + p
    tl.store(at, _as(g * slope, out.dtype.element_ty), mask=inside)
    tl.store(at + C * P, _as(g * first * (s * (1.0 - s)), out.dtype.element_ty), mask=inside)


def _positions(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x [B, C, H, W] and its strides as [B, C, H W]; pictures whose rows do not lie evenly in memory are copied."""
    if x.shape[2] > 1 and x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2))


def _gate_launch(kernel, inputs: tuple[Tensor, ...], vector: Tensor | None, out: Tensor, channels: int, kind: int) -> Tensor:
    """Run a gate kernel over out [B, .., H, W]; each input goes in with its three strides."""
    positions, tile = out.shape[2] * out.shape[3], _tuning.GATE
    tiles = cdiv(channels, tile["BLOCK_C"]), cdiv(positions, tile["BLOCK_P"])
    words = []
    for tensor in inputs:
        tensor, strides = _positions(tensor)
        words += [tensor, *strides]
    if out.numel():
        with on_device(out):
            kernel[(out.shape[0] * tiles[0] * tiles[1],)](
                *words, out if vector is None else vector.contiguous(), out, channels, positions, *tiles, KIND=kind,
                VECTOR=vector is not None, **tile,
            )  # fmt: skip
    return out


def gate_triton(x: Tensor, vector: Tensor | None, kind: int) -> Tensor:
    """x [B, 2 C, H, W], vector [B, 2 C] or None -> [B, C, H, W] contiguous."""
    out = torch.empty((x.shape[0], x.shape[1] // 2, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return _gate_launch(_gate_kernel, (x,), vector, out, out.shape[1], kind)


def gate_backward_triton(grad: Tensor, x: Tensor, vector: Tensor | None, kind: int) -> Tensor:
    """grad [B, C, H, W] -> gradient to x [B, 2 C, H, W], contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _gate_launch(_gate_backward_kernel, (grad, x), vector, out, grad.shape[1], kind)

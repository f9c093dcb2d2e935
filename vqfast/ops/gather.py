"""gather: codes of given indices, with a deterministic gradient to the codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops import _shapes


def _fake(codebook, indices):
    b, g, n = indices.shape
    return codebook.new_empty(b, g, n, codebook.shape[-1])


def _setup_context(ctx, inputs, output):
    codebook, indices = inputs
    ctx.save_for_backward(indices)
    ctx.codebook_size, ctx.dtype = codebook.shape[1], codebook.dtype


def _backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    return scatter(grad, indices, ctx.codebook_size).to(ctx.dtype), None


@_border.bound_once
class Scatter(torch.autograd.Function):
    """The transpose of gather; linear, so its own gradient is gather again (a gradient penalty needs that)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, indices, codebook_size):
        return _border.call("code_stats", _backends.choose("ema", None, rows))(rows, indices, codebook_size)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        return _border.call("gather", _backends.choose("gather", None, grad))(grad, indices).to(ctx.dtype), None, None


def scatter(rows: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """Sum rows [B, G, N, D] by index [B, G, N] into [G, K, D], in a fixed order."""
    return Scatter.apply(rows, indices, codebook_size)


_border.define(
    "gather",
    "(Tensor codebook, Tensor indices) -> Tensor",
    family="gather",
    reference=reference.gather,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


@_border.bound_once
class Gather(torch.autograd.Function):
    """gather with its gradient: d codebook[g, k] = sum of the gradients of the rows that took code k."""

    generate_vmap_rule = True

    @staticmethod
    def forward(codebook, indices, backend):
        return _border.call("gather", backend)(codebook, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_context(ctx, inputs[:2], output)

    @staticmethod
    def backward(ctx, grad):
        return *_backward(ctx, grad), None


def gather(codebook: Tensor, indices: Tensor, *, backend: str | None = None, validate: bool | None = None) -> Tensor:
    """Look up codes: out[..., :] = codebook[indices[...]], zeros where the index is -1.

    **Shapes**: codebook [K, D], indices [...] -> [..., D]; or codebook [G, K, D], indices [..., G, N] -> [..., G, N, D].

    Args:
        codebook: any floating dtype.
        indices: integers in 0..K-1, or -1 for a masked position.
        backend: see `nearest`.
        validate: check the range on a GPU too, where that waits for the device; without, an index out of range reads nothing there and
            gives zeros. On the CPU it is always checked.

    Returns:
        Tensor of codebook's dtype.

    Raises:
        IndexError: an index is out of range. ValueError, TypeError: shapes, devices or dtypes do not fit.

    Gradient: to the codebook, summed in float64 in a fixed order (deterministic).
    """
    indices = _shapes.check_indices("indices", indices)
    groups = _shapes.check_codebook(codebook, indices, "indices are")
    if indices.device != codebook.device:
        raise ValueError(
            f"codebook is {_shapes.describe(codebook)}, indices are {_shapes.describe(indices)}: both must be on one device."
        )
    if codebook.dim() == 3 and (indices.dim() < 2 or indices.shape[-2] != codebook.shape[0]):
        raise ValueError(
            f"codebook is {_shapes.describe(codebook)}, indices are {_shapes.describe(indices)}: a grouped codebook [G, K, D]"
            " needs indices [..., G, N] with the same G."
        )
    flat = _shapes.collapse_leading(indices, 2) if codebook.dim() == 3 else indices.reshape(1, 1, indices.numel())
    chosen = _backends.choose("gather", backend, groups)
    rows = _shapes.with_range_checked(lambda: look_up(groups, flat, chosen), indices, groups.shape[1], chosen, validate)
    return rows.reshape(*indices.shape, codebook.shape[-1])


def look_up(codebook: Tensor, indices: Tensor, backend: str) -> Tensor:
    """gather on canonical shapes (no checks)."""
    # A traced graph must hold the op itself, whose gradient is registered with it; eager calls take the cheaper Function, and
    # none where no gradient can be asked for.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _border.call("gather", backend)(codebook, indices)
    return Gather.apply(codebook, indices, backend)

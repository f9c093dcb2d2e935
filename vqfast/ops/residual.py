"""residual: Q quantizers in a row, each on what the ones before left over, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops import _shapes, quantize
from vqfast.ops.gather import look_up
from vqfast.ops.quantize import Quantized
from vqfast.ops.straight_through import difference


def _fake(x, codebooks, mask, metric, with_sums, with_pull):
    b, g, n, d = x.shape
    q, _, k, _ = codebooks.shape
    work = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    return (
        torch.empty_like(x),
        x.new_empty(2, dtype=torch.float64),
        x.new_empty(q, b, g, n, dtype=torch.int64),
        x.new_empty((q, g, k, d) if with_sums else (0,), dtype=work),
        x.new_empty(q, g, k, dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((b, g, n, d) if with_pull else (0,), dtype=work),
    )


def _setup_context(ctx, inputs, output):
    x, codebooks, mask = inputs[:3]
    indices, pull = output[2], output[6]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    # Codebooks that follow a moving average change right after the lookup, so the gradient into x is prepared by the op. A gather
    # in backward would not do: a compiled graph would repeat it from the codebook as it is then (torch 2.13). x is the caller's, and its
    # second derivative asks for it.
    learns = ctx.needs_input_grad[1]
    ctx.save_for_backward(indices, pull, x, *((codebooks,) if learns else ()))
    ctx.dtype, ctx.masked, ctx.input_count = x.dtype, mask is not None, len(inputs)


def _backward(ctx, grad_quantized, grad_error, *_):
    """The identity into x, and the gradient of the squared errors; codes of earlier levels are constants."""
    indices, pull, x, *kept = ctx.saved_tensors
    grad_x = grad_codebooks = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_quantized
        if grad_x is not None and ctx.masked:
            grad_x = torch.where((indices[0] >= 0)[..., None], grad_x, 0)
        if grad_error is not None:
            if torch.is_grad_enabled():  # each level's rest follows x, the codes taken as constants
                follows = len(indices) * (x - x.detach()).to(pull.dtype)
                pull = pull + reference.where_counted(follows, indices[0])
            factor = (2 * grad_error[0]).to(pull.dtype)
            grad_x = pull * factor if grad_x is None else torch.addcmul(grad_x.to(pull.dtype), pull, factor)
            grad_x = grad_x.to(ctx.dtype)
    if ctx.needs_input_grad[1] and grad_error is not None:
        grad_codebooks = -2 * grad_error[1] * _sums_of_errors(x.detach(), *kept, indices)
        grad_codebooks = grad_codebooks.to(kept[0].dtype)
    return grad_x, grad_codebooks, *(None,) * (ctx.input_count - 2)


def _sums_of_errors(x: Tensor, codebooks: Tensor, indices: Tensor) -> Tensor:
    """Per level and code the sum of (rest - code) over its rows, [Q, G, K, D]."""
    backend = _backends.choose("gather", None, codebooks)
    rest, sums = x.to(torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)), []
    for codebook, level in zip(codebooks, indices, strict=True):
        codes = look_up(codebook, level, backend).to(rest.dtype)
        sums.append(quantize.scatter(difference(rest, codes, level), level, codebooks.shape[2]))
        rest = rest - codes.detach()
    return torch.stack(sums)


_border.define(
    "residual",
    "(Tensor x, Tensor codebooks, Tensor? mask, int metric, bool with_sums, bool with_pull)"
    " -> (Tensor quantized, Tensor sq_error, Tensor indices, Tensor sums, Tensor counts, Tensor nonfinite, Tensor pull)",
    family="residual",
    reference=reference.residual,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _residual_cuda(*arguments):
    """Level by level on the CUDA kernels of quantize."""
    return reference.residual(*arguments, level=_border.call("quantize", "cuda"))


_border.implement("residual", "cuda", _residual_cuda)


@_border.bound_once
class Residual(torch.autograd.Function):
    """The residual op of one backend with its gradient; the same rules are registered on the op."""

    @staticmethod
    def forward(x, codebooks, mask, metric, with_sums, with_pull, backend):
        return _border.call("residual", backend)(x, codebooks, mask, metric, with_sums, with_pull)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


def step(x, codebooks, mask=None, *, metric=0, with_sums=False, backend=None) -> quantize.Step:
    """Run the op on canonical shapes: x [B, G, N, D], codebooks [Q, G, K, D].

    indices, sums and counts have a leading Q; sq_error is that of all levels together.
    """
    chosen = _backends.choose("residual", backend, x, codebooks)
    with_pull = torch.is_grad_enabled() and x.requires_grad
    arguments = (x, codebooks, mask, metric, with_sums, with_pull)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return quantize.Step(*_border.call("residual", chosen)(*arguments)[:6])
    return quantize.Step(*Residual.apply(*arguments, chosen)[:6])


def residual_quantize(
    x: Tensor,
    codebooks: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "l2",
    commitment_weight: float = 0.25,
    backend: str | None = None,
) -> Quantized:
    """Quantize x by Q codebooks in a row; level q quantizes what levels 0..q-1 left over.

    r_0 = x, i_q = nearest(r_q), r_{q+1} = r_q - code(i_q), quantized = sum_q code(i_q).

    **Shapes**: x [..., D], codebooks [Q, K, D], mask [...] -> quantized [..., D], indices [..., Q].

    Args:
        x, mask, metric, commitment_weight, backend: see `vector_quantize`. The rest r is kept in float32 (float64 for float64).
        codebooks: Q codebooks of one size.

    Returns:
        Quantized; losses are means over levels, perplexity and usage as well; indices carry the level last.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the metric do not fit.

    Gradient: d quantized / d x is the identity (as in EnCodec); each level's losses to x and to its own codebook.
    """
    code = _shapes.check_metric(metric)
    _shapes.check_float("codebooks", codebooks)
    if codebooks.dim() != 3 or codebooks.numel() == 0:
        raise ValueError(f"codebooks must be [Q, K, D] and not empty, got {_shapes.describe(codebooks)}.")
    rows, _ = _shapes.canonical(x, codebooks[0])
    leading = _shapes.leading_shape(x)
    mask = quantize.check_mask(mask, x, leading)
    if mask is not None:
        mask = mask.reshape(rows.shape[0], rows.shape[2])
    result = step(rows, codebooks[:, None], mask, metric=code, backend=backend)
    valid = result.counts[0].sum()
    commitment_loss, codebook_loss = quantize.losses(result.sq_error / len(codebooks), valid, x.shape[-1])
    perplexity, usage = quantize.code_metrics(result.counts[:, 0])
    return Quantized(
        result.quantized.reshape(x.shape),
        result.indices.movedim(0, -1).reshape(*leading, len(codebooks)),
        codebook_loss + commitment_weight * commitment_loss,
        commitment_loss,
        codebook_loss,
        perplexity,
        usage,
        result.nonfinite,
    )

"""quantize: the fused quantizer step: codes, quantized rows, losses, counts and sums, with straight-through backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops import _shapes
from vqfast.ops.gather import scatter
from vqfast.ops.hints import SearchHints
from vqfast.ops.straight_through import difference, straight_through


@_border.exportable
class Quantized(NamedTuple):
    """The one result of quantizer ops and layers.

    Attributes:
        quantized: codes in x's shape and dtype, and in its memory layout (where that flattens to rows); gradient: straight-through to x.
        indices: int64, -1 where masked.
        loss: codebook_loss + commitment_weight * commitment_loss; what a trainer adds to its own loss.
        commitment_loss: mean over valid rows and D of (x - sg[code])^2; its gradient goes to x.
        codebook_loss: mean over valid rows and D of (sg[x] - code)^2; its gradient goes to the codebook.
        perplexity: exp of the entropy (nats) of this step's code counts; 1 for an empty batch; 1..K.
        usage: share of the codes that this step used, 0..1.
        nonfinite: int64 count of rows with NaN or Inf.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    perplexity: Tensor
    usage: Tensor
    nonfinite: Tensor


def _fake(x, codebook, mask, metric, with_sums, order=None, basis=None, guess=None):
    b, g, n, d = x.shape
    float64 = torch.float64 in (x.dtype, codebook.dtype)
    k = codebook.shape[1]
    sums_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x),
        x.new_empty(2, dtype=torch.float64),
        x.new_empty(b, g, n, dtype=torch.int64),
        x.new_empty((g, k, d) if with_sums else (0,), dtype=sums_dtype),
        x.new_empty(g, k, dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    x, codebook, mask = inputs[:3]
    quantized, indices = output[0], output[2]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    # The rows just written are the codes themselves. Where x is narrower than the codebook they are not, and where the codebook
    # learns by gradient its second derivative needs it: then keep the codebook.
    ctx.keeps_codebook = x.dtype != codebook.dtype or ctx.needs_input_grad[1]
    ctx.codebook_size, ctx.codebook_dtype = codebook.shape[1], codebook.dtype
    ctx.save_for_backward(x, codebook if ctx.keeps_codebook else quantized, indices)
    ctx.masked = mask is not None
    ctx.input_count = len(inputs)


def _backward(ctx, grad_quantized, grad_error, *_):
    """Straight-through into x, and the gradient of the two squared errors, each to its own side."""
    x, codes, indices = ctx.saved_tensors
    grad_x = grad_codebook = None
    if ctx.needs_input_grad[0] and grad_quantized is not None and grad_error is None:
        grad_x = torch.where((indices >= 0)[..., None], grad_quantized, 0) if ctx.masked else grad_quantized
    if grad_error is not None:
        if ctx.needs_input_grad[0]:
            grad_x = straight_through(grad_quantized, x, codes.detach(), indices, 2 * grad_error[0])
        if ctx.needs_input_grad[1]:
            rest = difference(x.detach(), codes, indices)
            sums = scatter(rest, indices, ctx.codebook_size)
            grad_codebook = (sums * (-2 * grad_error[1]).to(sums.dtype)).to(ctx.codebook_dtype)
    return grad_x, grad_codebook, *(None,) * (ctx.input_count - 2)


_border.define(
    "quantize",
    "(Tensor x, Tensor codebook, Tensor? mask, int metric, bool with_sums, Tensor? order=None, Tensor? basis=None,"
    " Tensor? guess=None) -> (Tensor quantized, Tensor sq_error, Tensor indices, Tensor sums, Tensor counts, Tensor nonfinite)",
    family="quantize",
    reference=reference.quantize,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


@_border.bound_once
class Quantize(torch.autograd.Function):
    """The quantize op of one backend with its straight-through gradient; the same rules are registered on the op."""

    @staticmethod
    def forward(x, codebook, mask, metric, with_sums, order, basis, guess, backend):
        return _border.call("quantize", backend)(x, codebook, mask, metric, with_sums, order, basis, guess)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


class Step(NamedTuple):
    """Raw outputs of the op, canonical shapes; what layers build on."""

    quantized: Tensor  # [B, G, N, D], x's dtype and layout
    sq_error: Tensor  # [2] float64, the same sum twice: gradient to x, gradient to the codebook
    indices: Tensor  # [B, G, N] int64
    sums: Tensor  # [G, K, D] float32, or [0]
    counts: Tensor  # [G, K] int64
    nonfinite: Tensor  # [] int64


def step(x, codebook, mask=None, *, metric=0, with_sums=False, hints=SearchHints(), backend=None) -> Step:
    """Run the fused step on canonical shapes (no checks)."""
    chosen = _backends.choose("quantize", backend, x, codebook)
    arguments = (x, codebook, mask, metric, with_sums, *hints)
    # A traced graph must hold the op itself, whose gradient is registered with it; eager calls take the cheaper Function, and
    # none where no gradient can be asked for.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return Step(*_border.call("quantize", chosen)(*arguments))
    return Step(*Quantize.apply(*arguments, chosen))


def losses(sq_error: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(commitment_loss, codebook_loss), means over `rows` valid rows and `dim`, float32; 0 without rows."""
    mean = (sq_error / (rows.clamp(min=1) * dim)).to(torch.float32)
    return mean[0], mean[1]


def code_metrics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(perplexity, usage) of counts [G, K], float32 scalars, averaged over groups."""
    total = counts.sum(-1, keepdim=True).clamp(min=1)
    share = counts / total
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return entropy.exp().mean().to(torch.float32), (counts > 0).to(torch.float32).mean()


def check_mask(mask: Tensor | None, x: Tensor, leading: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = valid), got {getattr(mask, 'dtype', type(mask).__name__)}.")
    if tuple(mask.shape) != leading or mask.device != x.device:
        raise ValueError(
            f"mask is {_shapes.describe(mask)}, x is {_shapes.describe(x)}: mask needs x's shape without the channel axis,"
            f" {list(leading)}, on the same device."
        )
    return mask


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: str = "l2",
    commitment_weight: float = 0.25,
    backend: str | None = None,
) -> Quantized:
    """Replace every row of x by its nearest code, with the losses of the VQ-VAE.

    loss = mean (sg[x] - code)^2 + commitment_weight * mean (x - sg[code])^2; the paper's eq. 3 sums over D where we take the
    mean, so its terms are D times ours.

    **Shapes**: x [..., D], codebook [K, D], mask [...]; or x [..., G, N, D], codebook [G, K, D], mask [..., N].

    Args:
        x: rows; float32, float16, bfloat16 or float64, any strides.
        codebook: codes, any of these dtypes; values are taken exactly.
        mask: bool, True = valid. Masked positions get index -1, quantized 0, gradient 0, and count nowhere.
        metric: "l2", "cosine" or "dot"; it picks the code, the losses are squared l2 distances in every case.
        commitment_weight: the paper's beta.
        backend: see `nearest`.

    Returns:
        Quantized; losses, perplexity and usage are 0-d float32.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the metric do not fit.

    Gradient: quantized passes its gradient to x unchanged (straight-through); each loss term to its own side.

    Numerics: codes as in `nearest`. Rows with NaN or Inf give index 0 and a NaN row, and enter no loss and no count.

    Source: van den Oord et al. 2017, eq. 3 (loss) and section 3.2 (straight-through).
    """
    code = _shapes.check_metric(metric)
    rows, groups = _shapes.canonical(x, codebook)
    leading = _shapes.leading_shape(x)
    mask = check_mask(mask, x, leading if codebook.dim() == 2 else (*leading[:-2], leading[-1]))
    if mask is not None:
        mask = mask.reshape(rows.shape[0], rows.shape[2])
    result = step(rows, groups, mask, metric=code, backend=backend)
    valid = result.counts.sum()
    commitment_loss, codebook_loss = losses(result.sq_error, valid, x.shape[-1])
    perplexity, usage = code_metrics(result.counts)
    return Quantized(
        result.quantized.reshape(x.shape),
        result.indices.reshape(leading),
        codebook_loss + commitment_weight * commitment_loss,
        commitment_loss,
        codebook_loss,
        perplexity,
        usage,
        result.nonfinite,
    )

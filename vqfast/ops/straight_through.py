"""straight_through: the gradient of a quantizer step into its rows, in one pass; what backward runs where it is not recorded itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops.gather import look_up

_border.define(
    "straight_through",
    "(Tensor? grad, Tensor x, Tensor codes, Tensor indices, float factor) -> Tensor",
    family="straight_through",
    reference=lambda grad, x, *rest: reference.laid_out_like(x, reference.straight_through(grad, x, *rest)),
    fake=lambda grad, x, codes, indices, factor: torch.empty_like(x),
)


def straight_through(grad: Tensor | None, x: Tensor, codes: Tensor, indices: Tensor, factor: Tensor) -> Tensor:
    """grad + factor (x - code): the identity, and the pull of an error term towards the codes.

    **Shapes**: grad, x [B, G, N, D]; codes [B, G, N, D] in x's dtype, or a codebook [G, K, D] that is read by index; indices [B, G, N];
    factor [].

    0 where an index is -1; without the second part in rows where a difference is not finite. grad may be None. The result has x's dtype.
    Where it is itself differentiated or traced, and on a GPU, it is plain torch; on the CPU one pass, and the result has x's layout.

    Source: van den Oord et al. 2017, section 3.2 (straight-through) and eq. 3 (the error terms).
    """
    if _native(x, codes):
        return _border.call("straight_through", "cpu")(grad, x, codes, indices, float(factor))
    return reference.straight_through(grad, x, _rows(codes, indices), indices, factor)


def difference(x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """x - code, 0 in rows that are masked or where it is not finite; float32 or wider. Shapes as in `straight_through`."""
    work = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    x, codes = x.to(work), codes if codes.dim() == 3 else codes.to(work)
    if _native(x, codes):
        return _border.call("straight_through", "cpu")(None, x, codes, indices, 1.0)
    rest = x - _rows(codes, indices).to(work)
    all_count = all_finite(rest.detach()) and (indices.numel() == 0 or bool(indices.min() >= 0))
    return rest if all_count else reference.where_counted(rest, indices)


def _native(x: Tensor, codes: Tensor) -> bool:
    recorded = torch.is_grad_enabled() or _border.is_traced()
    return not recorded and _backends.runs_on_cpu("straight_through", x, codes)


def all_finite(x: Tensor) -> bool:
    """True: no value is NaN or Inf. False also where looking would cost more than it saves, or may not be done."""
    if x.device.type != "cpu" or type(x) is not Tensor or _border.is_traced():
        return False
    return bool(x.sum().isfinite())  # only if all its terms are


def _rows(codes: Tensor, indices: Tensor) -> Tensor:
    if codes.dim() == 4:
        return codes
    return look_up(codes, indices, _backends.choose("gather", None, codes))

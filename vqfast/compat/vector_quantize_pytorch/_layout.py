"""Between a user's layout and rows [B, C, N, D] with C codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.ops import _shapes
from vqfast.ops.straight_through import all_finite


def channels_last(x: Tensor, dim: int, *, channel_first: bool, spatial: int | None) -> Tensor:
    """x with its channel axis moved last, a view; x [B, dim] is a batch of single tokens in every layout.

    spatial: number of axes beside batch and channels, or None for any.
    """
    _shapes.check_float("x", x)
    first = channel_first and x.dim() > 2
    fits = x.dim() >= 2 and x.shape[1 if first else -1] == dim and (spatial is None or x.dim() in (2, spatial + 2))
    layout = ", ".join(["B", *([str(dim)] if channel_first else []), *("..." if spatial is None else "DHW"[3 - spatial :])])
    layout = layout if channel_first else f"B, ..., {dim}"
    require(fits, f"x is {_shapes.describe(x)}; this layer takes [{layout}] or [B, {dim}].")
    return x.movedim(1, -1) if first else x


def channels_back(x: Tensor, like: Tensor, channel_first: bool) -> Tensor:
    """Inverse of `channels_last`: [B, ..., dim] to the layout of `like`, the user's input."""
    return x.movedim(-1, 1) if channel_first and like.dim() > 2 else x


def rows_of(x: Tensor, heads: int, separate: bool) -> Tensor:
    """[B, ..., heads * D] -> [B, heads, N, D] with a codebook per head, else [B, 1, heads * N, D]; single tokens are one batch.

    Heads that share a codebook come one after another, as in the other library, so that random draws over rows are the same. That
    takes a copy, small beside the search.
    """
    single = x.dim() == 2
    x = x[None] if single else x.flatten(1, -2)
    if heads == 1:
        return x[:, None]
    x = x.unflatten(-1, (heads, -1))
    if separate:
        return x.transpose(1, 2)
    return (x if single else x.transpose(1, 2)).flatten(1, 2)[:, None]


def from_rows(rows: Tensor, leading: tuple[int, ...], heads: int, separate: bool) -> Tensor:
    """[B, C, N, ...] -> [*leading, heads, ...], without the axis of heads where there is one."""
    if heads == 1:
        return rows[:, 0].reshape(*leading, *rows.shape[3:])
    if separate:
        return rows.transpose(1, 2).reshape(*leading, heads, *rows.shape[3:])
    if len(leading) == 1:
        return rows[:, 0].reshape(*leading, heads, *rows.shape[3:])
    return rows[:, 0].unflatten(1, (heads, -1)).transpose(1, 2).reshape(*leading, heads, *rows.shape[3:])


def rows_mask(mask: Tensor, heads: int, separate: bool) -> Tensor:
    """[B, ...] -> [B, N] as `rows_of` orders rows."""
    single = mask.dim() == 1
    mask = mask[None] if single else mask.flatten(1)
    if heads == 1 or separate:
        return mask
    return mask.repeat_interleave(heads, 1) if single else mask.repeat(1, heads)


def by_position(rows: Tensor, leading: tuple[int, ...], heads: int, separate: bool) -> Tensor:
    """Rows of single tokens as a batch of them, and heads that share a codebook as more batch: [B', C, positions, D]."""
    if len(leading) == 1:
        return rows[0].transpose(0, 1)[:, :, None]
    return rows.unflatten(2, (heads, -1)).flatten(0, 2)[:, None] if heads > 1 and not separate else rows


def finite_of(x: Tensor) -> Tensor | None:
    """[...] bool: the positions of x [..., D] that are finite; None where a look, cheap on a CPU, finds no others."""
    x = x.detach()
    return None if all_finite(x) else x.isfinite().all(-1)


def where_finite(x: Tensor, finite: Tensor | None, other: float) -> Tensor:
    """x [..., D] with `other` at the positions that `finite`, as of `finite_of`, leaves out; no gradient passes there."""
    return x if finite is None else torch.where(finite[..., None], x, other)


def over(mask: Tensor, t: Tensor) -> Tensor:
    """A mask of the first axes of t, with axes of size 1 for the others."""
    return mask.reshape(*mask.shape, *(1,) * (t.dim() - mask.dim()))


def mask_of(x: Tensor, leading: tuple[int, ...], mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """The mask over `leading`, from a mask of its first axes or from lengths along its second."""
    require(mask is None or lens is None, "pass mask or lens, not both.")
    if lens is not None:
        require(len(leading) > 1, "lens needs a sequence [B, N, ...]; x holds single tokens.")
        mask = torch.arange(leading[1], device=x.device) < lens.to(x.device)[:, None]
    if mask is None:
        return None
    require(
        isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == leading[: mask.dim()],
        f"mask is {_shapes.describe(mask) if isinstance(mask, Tensor) else mask!r}; it must be bool (True = valid) of shape"
        f" {list(leading)}, or of its first axes.",
    )
    return mask.reshape(*mask.shape, *(1,) * (len(leading) - mask.dim())).expand(leading)

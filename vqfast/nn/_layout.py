"""Between a user's layout (any rank, any channel axis) and the canonical [B, G, N, D] of the ops; views where strides allow."""

from __future__ import annotations

from torch import Tensor

from vqfast.ops import _shapes


def check_channels(z: Tensor, dim: int, channel_dim: int) -> None:
    """Raise ValueError when z's channel axis does not hold `dim` channels; name the axis that does."""
    _shapes.check_float("z", z)
    if z.dim() < 2 or not -z.dim() <= channel_dim < z.dim():
        raise ValueError(f"z is {_shapes.describe(z)}: it needs at least 2 axes and a channel axis {channel_dim}.")
    if z.shape[channel_dim] != dim:
        fits = [axis for axis in range(z.dim()) if z.shape[axis] == dim]
        advice = f"channel_dim={fits[0]} would fit" if fits else f"no axis of z has length {dim}"
        raise ValueError(
            f"z is {_shapes.describe(z)}: axis channel_dim={channel_dim} has length {z.shape[channel_dim]}, the layer's dim is"
            f" {dim}; {advice}."
        )


def to_rows(z: Tensor, channel_dim: int, groups: int) -> Tensor:
    """z (channels last already moved) [B, *spatial, C] -> [B, G, N, C / G]; a 2-D z [N, C] is one batch."""
    z = z.movedim(channel_dim, -1)
    z = z[None] if z.dim() == 2 else z.flatten(1, -2)
    return z.unflatten(-1, (groups, -1)).transpose(1, 2)


def from_rows(rows: Tensor, like_shape: tuple[int, ...], channel_dim: int) -> Tensor:
    """[B, G, N, D] -> the layout of z, whose shape without the channel axis is `like_shape`."""
    z = rows.transpose(1, 2).flatten(-2)  # [B, N, C]
    return z.reshape(*like_shape, z.shape[-1]).movedim(-1, channel_dim)


def without_channel(shape: tuple[int, ...], channel_dim: int) -> tuple[int, ...]:
    kept = list(shape)
    del kept[channel_dim]
    return tuple(kept)


def indices_to_user(indices: Tensor, like_shape: tuple[int, ...]) -> Tensor:
    """[B, G, N] -> [B, *spatial], or [B, G, *spatial] with several groups ([N, G] for a 2-D z)."""
    groups = indices.shape[1]
    if groups == 1:
        return indices.reshape(like_shape)
    if len(like_shape) == 1:
        return indices[0].T
    return indices.reshape(like_shape[0], groups, *like_shape[1:])


def indices_to_rows(indices: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """Inverse of `indices_to_user`: indices [B, G, N] and z's shape without the channel axis."""
    if groups == 1:
        flat = indices.reshape(1, 1, -1) if indices.dim() < 2 else indices.reshape(indices.shape[0], 1, -1)
        return flat, tuple(indices.shape)
    if indices.dim() < 2 or indices.shape[1] != groups:
        raise ValueError(f"indices are {_shapes.describe(indices)}: this layer has {groups} groups, it needs [B, {groups}, ...].")
    if indices.dim() == 2:
        return indices.T[None], (indices.shape[0],)
    return indices.reshape(*indices.shape[:2], -1), (indices.shape[0], *indices.shape[2:])

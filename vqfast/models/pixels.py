"""The one picture convention: uint8 [0, 255] as data, float [-0.5, 0.5] in models."""

from __future__ import annotations

import torch
from torch import Tensor


def pixels_to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns 8-bit pictures into what the models take: `pixels / 255 - 0.5`.

    Args:
        pixels: uint8, any shape.
        dtype: floating dtype of the result.

    Returns:
        Tensor of the same shape in [-0.5, 0.5].

    Raises:
        TypeError: `pixels` is not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(
            f"pixels has dtype {pixels.dtype}, expected torch.uint8 (0 to 255); a float picture that is "
            "already in [-0.5, 0.5] needs no conversion"
        )
    return pixels.to(dtype) / 255 - 0.5


def float_to_pixels(x: Tensor) -> Tensor:
    """The inverse of `pixels_to_float`: rounds to the nearest of the 256 levels and clamps; NaN becomes 0.

    Args:
        x: floating, any shape, [-0.5, 0.5] and what a decoder adds around it.

    Returns:
        uint8 tensor of the same shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating dtype with values in [-0.5, 0.5]")
    levels = (x.float() + 0.5) * 255
    return levels.round().clamp(0, 255).nan_to_num(0).to(torch.uint8)


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Repeats the right column and the bottom row until height and width are multiples of `multiple`.

    Args:
        x: [..., H, W], any dtype, H and W at least 1.
        multiple: the model's `stride`.

    Returns:
        The padded tensor and the original (H, W): `padded[..., :H, :W]` is x again.
    """
    height, width = x.shape[-2:]
    if min(height, width) < 1 or multiple < 1:
        raise ValueError(f"cannot pad a picture of shape {tuple(x.shape)} to a multiple of {multiple}")
    rows = torch.arange(-(-height // multiple) * multiple, device=x.device).clamp_(max=height - 1)
    columns = torch.arange(-(-width // multiple) * multiple, device=x.device).clamp_(max=width - 1)
    return x.index_select(-2, rows).index_select(-1, columns), (height, width)

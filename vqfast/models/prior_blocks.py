"""Blocks of the autoregressive priors. Raster order: position (i, j) sees rows above i, and columns left of j in row i.

Kernels are stored as their unmasked rectangles, so nothing masked is stored, initialised or multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqfast.ops.masked_conv import gated_activation


class CausalConv2d(nn.Module):
    """k x k convolution that sees rows above, columns to the left and, with `include_center`, its own position.

    `above` holds the k // 2 rows above the centre, `row` the k // 2 taps left of it (and the centre).

    Shapes: [B, in_channels, H, W] -> [B, out_channels, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, include_center: bool = True):
        super().__init__()
        self.reach, self.include_center = kernel_size // 2, include_center
        self.above = nn.Conv2d(in_channels, out_channels, (self.reach, kernel_size), bias=False) if self.reach else None
        self.row = nn.Conv2d(in_channels, out_channels, (1, self.reach + include_center))

    def forward(self, x: Tensor) -> Tensor:
        y = self.row(pad_left(x, self.reach, self.include_center))
        return y if self.above is None else y + self.above(pad_above(x, self.reach, include_row=False))


def pad_above(x: Tensor, reach: int, include_row: bool) -> Tensor:
    """Zeros so that a kernel [reach (+ 1), 2 reach + 1] ends at the row above (or at the row itself)."""
    if not include_row:
        # The last row is above nobody; a map of one row has only padding above.
        return F.pad(x[:, :, :-1], (reach, reach, reach, 0))
    return F.pad(x, (reach, reach, reach, 0))


def pad_left(x: Tensor, reach: int, include_center: bool) -> Tensor:
    """Zeros so that a kernel [1, reach (+ 1)] ends left of the position (or at it)."""
    return F.pad(x, (reach, 0)) if include_center else F.pad(x[..., :-1], (reach, 0))


class GatedLayer(nn.Module):
    """One layer of the Gated PixelCNN: a vertical stack without blind spot that feeds a horizontal one.

        v' = W_v * v + e_v        out_v = gate(v')              W_v sees rows above, and the row itself after the
        first layer:
        h' = W_h * h + W_vh v' + e_h    out_h = W_r gate(h') + h      v at row i never depends on codes of row i

    e = bias + class embedding + 1 x 1 convolution of the spatial condition, for each stack its own.

    Shapes: v, h [B, C, H, W], label [B] int64, condition [B, Cc, H, W] -> (v, h) as before.
    Source: van den Oord et al. 2016 (1606.05328), figure 2 and eq. 4.
    """

    def __init__(self, channels: int, kernel_size: int, first: bool, classes: int, condition_channels: int):
        super().__init__()
        self.channels, self.reach, self.first = channels, kernel_size // 2, first
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.reach + (not first), kernel_size))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.reach + (not first)))
        self.vertical_to_horizontal = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.classes = nn.Embedding(classes, 4 * channels) if classes else None
        self.condition = nn.Conv2d(condition_channels, 4 * channels, 1, bias=False) if condition_channels else None
        if classes:
            nn.init.normal_(self.classes.weight, std=0.02)

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        vertical = self.vertical(pad_above(v, self.reach, include_row=not self.first))
        horizontal = self.horizontal(pad_left(h, self.reach, include_center=not self.first))
        class_h = None
        if label is not None:
            class_v, class_h = class_vector(self.classes, label).chunk(2, dim=1)
            vertical = vertical + class_v[:, :, None, None]
        if self.condition is not None:
            condition_v, condition_h = self.condition(condition).chunk(2, dim=1)
            vertical, horizontal = vertical + condition_v, horizontal + condition_h
        horizontal = horizontal + self.vertical_to_horizontal(vertical)
        out = self.residual(gated_activation(horizontal, class_h))
        return gated_activation(vertical), out if self.first else out + h


def class_vector(embedding: nn.Embedding, label: Tensor) -> Tensor:
    """Rows of the embedding; label -1 (no class) gives zeros."""
    return embedding(label.clamp_min(0)) * (label >= 0).to(embedding.weight.dtype)[:, None]


class GatedResidual(nn.Module):
    """x + glu(W_2 elu(W_1 * elu(x) + W_a aux) + e), the gated residual block of PixelSNAIL.

    W_1 is causal (mask B) of any kernel size, W_2 and W_a are 1 x 1; e as in `GatedLayer`, on the gated sum.

    Shapes: x [B, C, H, W], aux [B, Ca, H, W] or None -> [B, C, H, W].
    Source: Chen et al. 2017 (1712.09763), figure 3; dropout after each residual block: Razavi et al. 2019, section 3.2.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int,
        *,
        aux: int = 0,
        classes: int = 0,
        condition: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.widen = CausalConv2d(channels, hidden, kernel_size)
        self.aux = nn.Conv2d(aux, hidden, 1, bias=False) if aux else None
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Conv2d(hidden, 2 * channels, 1)
        self.classes = nn.Embedding(classes, 2 * channels) if classes else None
        self.condition = nn.Conv2d(condition, 2 * channels, 1, bias=False) if condition else None
        if classes:
            nn.init.normal_(self.classes.weight, std=0.02)

    def forward(
        self, x: Tensor, aux: Tensor | None = None, label: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        y = self.widen(F.elu(x))
        if self.aux is not None:
            y = y + self.aux(aux)
        y = self.narrow(self.dropout(F.elu(y)))
        if self.condition is not None:
            y = y + self.condition(condition)
        return x + gated_activation(y, None if label is None else class_vector(self.classes, label), kind="glu")


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and all before it in raster order.

    Keys and values also see the code just before their position, wherever it stands, so that attention reaches
    every earlier
    code, even at the far end of the row above. Queries and keys see the position ((i - H/2) / H, (j - W/2) / W).
    All of that is
    known before the code at the position is, so attending to itself is causal, and the softmax is never empty.

    Shapes: x [B, C, H, W], codes [B, Ce, H, W] (embedded), place [B, 2, H, W] -> [B, heads * value_channels, H, W].
    """

    def __init__(
        self,
        channels: int,
        code_channels: int,
        heads: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.key_channels, self.value_channels, self.dropout = heads, key_channels, value_channels, dropout
        self.query = nn.Conv2d(channels + 2, heads * key_channels, 1)
        self.key = nn.Conv2d(channels + code_channels + 2, heads * key_channels, 1)
        self.value = nn.Conv2d(channels + code_channels, heads * value_channels, 1)

    def forward(self, x: Tensor, codes: Tensor, place: Tensor) -> Tensor:
        informed = torch.cat([x, previous_in_raster_order(codes)], dim=1)
        query, key = self.query(torch.cat([x, place], dim=1)), self.key(torch.cat([informed, place], dim=1))
        q, k, v = (self._split(y) for y in (query, key, self.value(informed)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(2, 3).reshape(x.shape[0], -1, *x.shape[2:])

    def _split(self, x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)  # [B, heads, H * W, channels]


def previous_in_raster_order(x: Tensor) -> Tensor:
    """x one position later, row ends going on to the next row; zeros at the first position."""
    return F.pad(x.flatten(2)[..., :-1], (1, 0)).view_as(x)


def place_features(height: int, width: int, like: Tensor) -> Tensor:
    """[1, 2, H, W]: row and column as numbers in [-0.5, 0.5)."""
    rows = (torch.arange(height, device=like.device, dtype=like.dtype) - height / 2) / height
    columns = (torch.arange(width, device=like.device, dtype=like.dtype) - width / 2) / width
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])[None]


class ConditionStack(nn.Module):
    """Codes of the level above -> features of this level: embedding, residual blocks, nearest-neighbour enlargement.

    Shapes: codes [B, h, w] int64 -> [B, channels, h * scale, w * scale].
    """

    def __init__(self, codebook_size: int, channels: int, layers: int, scale: int):
        super().__init__()
        self.scale = scale
        self.embedding = nn.Embedding(codebook_size, channels)
        self.blocks = nn.ModuleList(_ConditionBlock(channels) for _ in range(layers))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes).movedim(-1, 1)
        for block in self.blocks:
            x = block(x)
        return F.interpolate(x, scale_factor=self.scale, mode="nearest") if self.scale > 1 else x


class _ConditionBlock(nn.Module):
    """x + glu(conv3x3(relu(conv3x3(relu(x))))): a gated residual block that sees all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + gated_activation(self.second(F.relu(self.first(F.relu(x)))), kind="glu")

"""PixelCNN and Gated PixelCNN over maps of codes."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.nn import functional as F

from .prior_blocks import CausalConv2d, GatedLayer, class_vector
from .priors import CodePrior, PriorConfig
from .program import Program, ProgramBuilder


@dataclasses.dataclass(frozen=True)
class GatedPixelCNNConfig(PriorConfig):
    """Args beyond PriorConfig: layers (the first has mask A), kernel_size, first_kernel_size, head_channels of
    the 1 x 1 head."""

    layers: int = 15
    kernel_size: int = 3
    first_kernel_size: int = 7
    head_channels: int = 512


class GatedPixelCNN(CodePrior):
    """Gated PixelCNN: two stacks, gates tanh * sigmoid, residual horizontal stack, class and spatial conditioning.

    Source: van den Oord et al. 2016 (1606.05328).
    """

    config_class = GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig | None = None, **fields):
        super().__init__(config, **fields)
        c = self.config
        self._build_inputs()
        kernels = [c.first_kernel_size] + [c.kernel_size] * (c.layers - 1)
        self.layers = nn.ModuleList(
            GatedLayer(c.channels, kernel, depth == 0, c.classes, self._condition_channels)
            for depth, kernel in enumerate(kernels)
        )
        self.head = Head(c.channels, c.head_channels, c.codebook_size)

    def _network(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h, labels, condition)
        return self.head(h)

    def program(self) -> Program:
        b = ProgramBuilder(self.config.codebook_size, self.config.classes, self._condition_channels)
        codes = b.embed(self.embedding.weight)
        v = h = codes
        raw, gated = b.ring(2 * self.config.channels), b.ring(self.config.channels)
        for layer in self.layers:
            v, h = _gated_layer(b, layer, v, h, raw, gated)
        self.head.emit(b, b.relu_of(h))
        return b.finish()


def _gated_layer(b: ProgramBuilder, layer: GatedLayer, v: int, h: int, raw: int, gated: int) -> tuple[int, int]:
    """The vertical stack and what it feeds to the horizontal one go by rows, the rest by positions."""
    c = layer.channels
    extra_v, extra_h = [], []
    if layer.condition is not None:
        condition_v, condition_h = layer.condition.weight.chunk(2)
        extra_v, extra_h = (
            [(b.condition, 0, 0, condition_v[:, :, 0, 0])],
            [(b.condition, 0, 0, condition_h[:, :, 0, 0])],
        )
    class_v, class_h = (None, None) if layer.classes is None else layer.classes.weight.chunk(2, dim=1)
    new_v, start, new_h = b.ring(c), b.ring(2 * c), b.ring(c)
    # The first layer's kernel ends at the row above, later ones at the row itself.
    taps = extra_v + b.taps(v, layer.vertical.weight, -layer.reach, -layer.reach)
    b.conv("row", taps, bias=layer.vertical.bias, classes=class_v, epilogue="gate", out=new_v, raw=raw)
    taps = extra_h + b.taps(raw, layer.vertical_to_horizontal.weight)
    b.conv("row", taps, bias=layer.horizontal.bias, classes=class_h, out=start)
    b.conv("pixel", b.taps(h, layer.horizontal.weight, 0, -layer.reach), init=start, epilogue="gate", out=gated)
    b.conv(
        "pixel",
        b.taps(gated, layer.residual.weight),
        bias=layer.residual.bias,
        out=new_h,
        residual=None if layer.first else h,
    )
    return new_v, new_h


class Head(nn.Module):
    """relu, 1 x 1, relu, 1 x 1. Shapes: [B, channels, H, W] -> logits [B, K, H, W]."""

    def __init__(self, channels: int, hidden: int, codebook_size: int):
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 1)
        self.second = nn.Conv2d(hidden, codebook_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(x))))

    def emit(self, b: ProgramBuilder, rectified: int) -> None:
        hidden = b.ring(self.first.out_channels)
        b.conv("pixel", b.taps(rectified, self.first.weight), bias=self.first.bias, epilogue="relu", out=hidden)
        b.logits(b.taps(hidden, self.second.weight), self.second.bias)


# ---- PixelCNN ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PixelCNNConfig(PriorConfig):
    """Args beyond PriorConfig: layers (residual blocks), kernel_size, first_kernel_size, head_channels."""

    layers: int = 15
    kernel_size: int = 3
    first_kernel_size: int = 7
    head_channels: int = 512


class PixelCNN(CodePrior):
    """PixelCNN: a 7 x 7 convolution with mask A, then residual blocks with mask B.

    One stack only, so it has the known blind spot right above; `GatedPixelCNN` has none.

    Source: van den Oord et al. 2016 (1601.06759), table 1 and figure 5.
    """

    config_class = PixelCNNConfig

    def __init__(self, config: PixelCNNConfig | None = None, **fields):
        super().__init__(config, **fields)
        c = self.config
        if c.channels % 2:
            raise ValueError(
                f"PixelCNNConfig.channels is {c.channels}; the residual blocks halve it, so it must be even."
            )
        self._build_inputs()
        self.first = CausalConv2d(c.channels, c.channels, c.first_kernel_size, include_center=False)
        self.blocks = nn.ModuleList(
            PixelBlock(c.channels, c.kernel_size, c.classes, self._condition_channels) for _ in range(c.layers)
        )
        self.head = Head(c.channels, c.head_channels, c.codebook_size)

    def _network(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, labels, condition)
        return self.head(x)

    def program(self) -> Program:
        c = self.config
        b = ProgramBuilder(c.codebook_size, c.classes, self._condition_channels)
        x = b.ring(c.channels)
        rectified = b.ring(c.channels)
        b.causal(b.embed(self.embedding.weight), self.first, out=x, act=rectified, act_kind="relu")
        for block in self.blocks:
            x, rectified = block.emit(b, x, rectified)
        self.head.emit(b, rectified)
        return b.finish()


class PixelBlock(nn.Module):
    """x + W_3 relu(W_2 * relu(W_1 relu(x) + e)); W_2 is causal at half the width, e comes from class and condition."""

    def __init__(self, channels: int, kernel_size: int, classes: int, condition_channels: int):
        super().__init__()
        half = channels // 2
        self.narrow = nn.Conv2d(channels, half, 1)
        self.causal = CausalConv2d(half, half, kernel_size)
        self.widen = nn.Conv2d(half, channels, 1)
        self.classes = nn.Embedding(classes, half) if classes else None
        if classes:
            nn.init.normal_(self.classes.weight, std=0.02)
        self.condition = nn.Conv2d(condition_channels, half, 1, bias=False) if condition_channels else None

    def forward(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        y = self.narrow(F.relu(x))
        if self.classes is not None:
            y = y + class_vector(self.classes, labels)[:, :, None, None]
        if self.condition is not None:
            y = y + self.condition(condition)
        return x + self.widen(F.relu(self.causal(F.relu(y))))

    def emit(self, b: ProgramBuilder, x: int, rectified: int) -> tuple[int, int]:
        channels, half = self.widen.out_channels, self.widen.in_channels
        narrow, middle, out, act = b.ring(half), b.ring(half), b.ring(channels), b.ring(channels)
        extra = [] if self.condition is None else b.taps(b.condition, self.condition.weight)
        classes = None if self.classes is None else self.classes.weight
        taps = extra + b.taps(rectified, self.narrow.weight)
        b.conv("pixel", taps, bias=self.narrow.bias, classes=classes, epilogue="relu", out=narrow)
        b.causal(narrow, self.causal, epilogue="relu", out=middle)
        b.conv(
            "pixel",
            b.taps(middle, self.widen.weight),
            bias=self.widen.bias,
            out=out,
            residual=x,
            act=act,
            act_kind="relu",
        )
        return out, act


# Sizes as the papers give them; what a paper leaves open (embedding width, head width) is this project's choice.
PIXELCNN_PRESETS: dict[str, PixelCNNConfig | GatedPixelCNNConfig] = {
    # 1601.06759, section 5.3, CIFAR-10: 15 blocks of h = 128 over 2 h = 256 channels, 1024 units in the head,
    # over 256 values.
    "pixelcnn-cifar10": PixelCNNConfig(codebook_size=256, channels=256, layers=15, head_channels=1024),
    # 1606.05328, section 3.2: conditional ImageNet model, 20 layers of 384 channels, 5 x 5 kernels, 1000 classes.
    "gated-imagenet": GatedPixelCNNConfig(
        codebook_size=256, channels=384, layers=20, kernel_size=5, head_channels=1024, classes=1000
    ),
    # 1711.00937, section 4.2: prior over the 32 x 32 codes of 128 x 128 ImageNet pictures, K = 512; depth is our
    # choice.
    "vqvae-imagenet128": GatedPixelCNNConfig(codebook_size=512, channels=128, layers=15, classes=1000),
}

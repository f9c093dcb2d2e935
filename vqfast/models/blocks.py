"""Convolutional encoder and decoder of the VQ-VAE paper, as Sonnet's published example builds them.

Picture -> [4x4 convolution, stride 2, ReLU] x stages -> 3x3 convolution -> residual stack -> features
Features -> 3x3 convolution -> residual stack -> [4x4 transposed convolution, stride 2] x stages -> picture

Source: van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), section 4.1;
channel counts of each layer from the example `vqvae_example` of Sonnet.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))).

    Shapes: [B, channels, H, W] -> the same.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv3 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv1 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class ResidualStack(nn.Module):
    """`layers` residual blocks and a closing ReLU. Shapes: [B, channels, H, W] -> the same."""

    def __init__(self, channels: int, hidden: int, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.relu(x)


class Encoder(nn.Module):
    """Picture to features, `2 ** stages` times smaller in height and width.

    The first strided convolution has hidden // 2 channels, the others `hidden`.

    Shapes: [B, in_channels, H, W] -> [B, hidden, H / 2**stages, W / 2**stages].
    """

    def __init__(
        self, in_channels: int, hidden: int, residual_hidden: int, residual_layers: int, stages: int
    ):
        super().__init__()
        widths = [in_channels, hidden // 2] + [hidden] * (stages - 1)
        self.down = nn.ModuleList(
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1) for narrow, wide in pairwise(widths)
        )
        self.conv = nn.Conv2d(widths[-1], hidden, 3, padding=1)
        self.residual = ResidualStack(hidden, residual_hidden, residual_layers)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.down:
            x = F.relu(conv(x))
        return self.residual(self.conv(x))


class Decoder(nn.Module):
    """Features to picture, the mirror image of `Encoder`; no activation at the end.

    Shapes: [B, in_channels, h, w] -> [B, out_channels, h * 2**stages, w * 2**stages].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int,
        residual_hidden: int,
        residual_layers: int,
        stages: int,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.residual = ResidualStack(hidden, residual_hidden, residual_layers)
        widths = [hidden] * (stages - 1) + [hidden // 2, out_channels]
        if stages == 1:
            widths = [hidden, out_channels]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1) for wide, narrow in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(self.conv(x))
        for conv in self.up[:-1]:
            x = F.relu(conv(x))
        return self.up[-1](x)

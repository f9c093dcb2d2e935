"""PixelSNAIL over maps of codes: gated residual blocks with causal attention, as the priors of VQ-VAE-2 use it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .prior_blocks import CausalAttention, CausalConv2d, GatedResidual, place_features
from .priors import CodePrior, PriorConfig
from .program import Program, ProgramBuilder


@dataclasses.dataclass(frozen=True)
class PixelSNAILConfig(PriorConfig):
    """Args beyond PriorConfig.

    blocks: each is `layers` gated residual blocks, then attention. layers: per block. attention_heads: 0 for no
    attention.
    key_channels, value_channels: per head. residual_channels: inner width of a residual block. kernel_size,
    first_kernel_size:
    odd. output_layers: 1 x 1 residual blocks before the logits. dropout: in residual blocks and on attention weights.
    """

    blocks: int = 4
    layers: int = 5
    residual_channels: int = 128
    kernel_size: int = 3
    first_kernel_size: int = 7
    attention_heads: int = 8
    key_channels: int = 16
    value_channels: int = 16
    output_layers: int = 0
    dropout: float = 0.1


class PixelSNAIL(CodePrior):
    """PixelSNAIL: a convolution with mask A, blocks of gated residual layers and attention, a 1 x 1 output stack.

    Every layer is one causal stream, so there is no blind spot: masks B reach left in the row and all columns above.

    Source: Chen et al. 2017 (1712.09763); the layout with top and bottom priors: Razavi et al. 2019 (1906.00446),
    section 3.2.
    """

    config_class = PixelSNAILConfig

    def __init__(self, config: PixelSNAILConfig | None = None, **fields):
        super().__init__(config, **fields)
        c = self.config
        self._build_inputs()
        self.first = CausalConv2d(c.channels, c.channels, c.first_kernel_size, include_center=False)
        self.blocks = nn.ModuleList(SnailBlock(c, self._condition_channels) for _ in range(c.blocks))
        self.output = nn.ModuleList(self._residual(kernel_size=1) for _ in range(c.output_layers))
        self.logits = nn.Conv2d(c.channels, c.codebook_size, 1)

    def _residual(self, kernel_size: int) -> GatedResidual:
        c = self.config
        return GatedResidual(c.channels, c.residual_channels, kernel_size, dropout=c.dropout)

    def _network(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        place = place_features(x.shape[2], x.shape[3], x).expand(x.shape[0], -1, -1, -1)
        codes, x = x, self.first(x)
        for block in self.blocks:
            x = block(x, codes, place, labels, condition)
        for block in self.output:
            x = block(x)
        return self.logits(F.elu(x))

    # ---- sampler ----

    def spatial_inputs(self, features: Tensor | None, count: int, height: int, width: int) -> Tensor | None:
        """The place (two channels), when there is attention, then the condition."""
        parts = [] if features is None else [features.detach().float().movedim(1, -1)]
        if self.config.attention_heads:
            like = self.logits.bias.detach().float()
            parts.insert(0, place_features(height, width, like)[0].movedim(0, -1).expand(count, height, width, 2))
        return torch.cat(parts, dim=-1).contiguous() if parts else None

    def program(self) -> Program:
        c = self.config
        place = 2 if c.attention_heads else 0
        b = ProgramBuilder(c.codebook_size, c.classes, place + self._condition_channels)
        x, active = b.ring(c.channels), b.ring(c.channels)
        codes = b.embed(self.embedding.weight)
        previous = b.previous(codes) if c.attention_heads else None
        b.causal(codes, self.first, out=x, act=active, act_kind="elu")
        for block in self.blocks:
            x, active = block.emit(b, x, active, previous, place)
        for block in self.output:
            x, active = emit_residual(b, block, x, active)
        b.logits(b.taps(active, self.logits.weight), self.logits.bias)
        return b.finish()


class SnailBlock(nn.Module):
    """`layers` gated residual layers, then attention whose result a 1 x 1 gated residual layer takes in."""

    def __init__(self, c: PixelSNAILConfig, condition_channels: int):
        super().__init__()
        shared = dict(classes=c.classes, condition=condition_channels, dropout=c.dropout)
        self.layers = nn.ModuleList(
            GatedResidual(c.channels, c.residual_channels, c.kernel_size, **shared) for _ in range(c.layers)
        )
        self.attention = self.merge = None
        if c.attention_heads:
            self.attention = CausalAttention(
                c.channels, c.channels, c.attention_heads, c.key_channels, c.value_channels, c.dropout
            )
            width = c.attention_heads * c.value_channels
            self.merge = GatedResidual(c.channels, c.residual_channels, 1, aux=width, dropout=c.dropout)

    def forward(
        self, x: Tensor, codes: Tensor, place: Tensor, labels: Tensor | None, condition: Tensor | None
    ) -> Tensor:
        for layer in self.layers:
            x = layer(x, None, labels, condition)
        return x if self.attention is None else self.merge(x, self.attention(x, codes, place))

    def emit(self, b: ProgramBuilder, x: int, active: int, previous: int | None, place: int) -> tuple[int, int]:
        for layer in self.layers:
            x, active = emit_residual(b, layer, x, active, place=place)
        if self.attention is None:
            return x, active
        a, projected = self.attention, []
        sources = {x: b.channels(x), previous: b.channels(previous), b.condition: 2}
        for layer, seen in ((a.query, (x, b.condition)), (a.key, (x, previous, b.condition)), (a.value, (x, previous))):
            parts = layer.weight.split([sources[s] for s in seen], dim=1)
            projected.append(b.ring(layer.out_channels))
            b.conv(
                "pixel", [tap for s, w in zip(seen, parts) for tap in b.taps(s, w)], bias=layer.bias, out=projected[-1]
            )
        attended = b.attend(*projected, a.heads)
        return emit_residual(b, self.merge, x, active, aux=attended)


def emit_residual(
    b: ProgramBuilder, layer: GatedResidual, x: int, active: int, *, aux: int | None = None, place: int = 0
) -> tuple[int, int]:
    """A gated residual layer; x and elu(x) in, the same two out. `place` channels stand before the condition's."""
    channels = b.channels(x)
    hidden, out, act = b.ring(layer.widen.row.out_channels), b.ring(channels), b.ring(channels)
    extra = [] if aux is None else b.taps(aux, layer.aux.weight)
    b.causal(active, layer.widen, extra=extra, epilogue="elu", out=hidden)
    taps = b.taps(hidden, layer.narrow.weight)
    if layer.condition is not None:
        # The place channels have weight zero here.
        taps = b.taps(b.condition, F.pad(layer.condition.weight.detach(), (0, 0, 0, 0, place, 0))) + taps
    classes = None if layer.classes is None else layer.classes.weight
    b.conv(
        "pixel",
        taps,
        bias=layer.narrow.bias,
        classes=classes,
        epilogue="glu",
        out=out,
        residual=x,
        act=act,
        act_kind="elu",
    )
    return out, act


# Sizes of Razavi et al. 2019, table of the appendix (hidden, residual, layers, attention layers, heads, filter, dropout,
# output and conditioning stacks). Attention comes after every layers / attention layers residual layers.
_IMAGENET = dict(codebook_size=512, channels=512, kernel_size=5, classes=1000, dropout=0.1)
_FFHQ = dict(codebook_size=512, channels=512, kernel_size=5)
_HEADS = dict(attention_heads=8, key_channels=64, value_channels=64)
_TOP = dict(residual_channels=2048, blocks=4, layers=5, output_layers=20, **_HEADS)
_FINER = dict(residual_channels=1024, blocks=1, condition_codes=512, condition_channels=512)
PIXELSNAIL_PRESETS: dict[str, PixelSNAILConfig] = {
    "imagenet256-top": PixelSNAILConfig(**_IMAGENET, **_TOP),
    "imagenet256-bottom": PixelSNAILConfig(**_IMAGENET, **_FINER, layers=20, attention_heads=0, condition_layers=20),
    "ffhq1024-top": PixelSNAILConfig(**_FFHQ, **_TOP, dropout=0.5),
    "ffhq1024-middle": PixelSNAILConfig(**_FFHQ, **_FINER, **_HEADS, layers=20, condition_layers=8, dropout=0.3),
    "ffhq1024-bottom": PixelSNAILConfig(
        **_FFHQ, **_FINER, layers=10, attention_heads=0, condition_layers=8, dropout=0.25
    ),
}

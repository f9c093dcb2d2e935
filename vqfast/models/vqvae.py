"""The VQ-VAE: convolutional encoder, vector quantizer, convolutional decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _border
from ..nn import VectorQuantizer, VectorQuantizerEMA
from ..ops.quantize import Quantized
from .blocks import Decoder, Encoder
from .likelihood import LIKELIHOODS, NATURAL_VARIANCE, Likelihood
from .pretrained import PretrainedModel


@_border.exportable
class ModelOutput(NamedTuple):
    """What a model gives for a batch of pictures.

    reconstruction: [B, C, H, W] float, the decoder's mean, not clamped.
    loss: 0-d float32, what a trainer minimises: reconstruction_loss + the quantizers' losses.
    reconstruction_loss: 0-d float32, mean over all elements; "mse": squared error / data_variance, else nats.
    levels: the quantizer results, one per level, from the finest in a hierarchy to the coarsest.
    """

    reconstruction: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    levels: list[Quantized]


class BitsPerDim(NamedTuple):
    """Bits per picture dimension (pixel and channel), 0-d float64: total = reconstruction + latents."""

    total: Tensor
    reconstruction: Tensor
    latents: Tensor


def check_settings(config: Any) -> None:
    """Refuses settings of a picture model that cannot be built, naming field, value and what is allowed."""
    ones = dict.fromkeys(("in_channels", "residual_hidden", "stages", "dim", "codebook_size", "groups"), 1)
    # The first strided convolution has hidden // 2 channels.
    for name, least in {**ones, "hidden": 2, "residual_layers": 0}.items():
        value = getattr(config, name, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}, it must be a whole number of at least {least}")
    choices = {"likelihood": LIKELIHOODS, "quantizer": ("ema", "loss"), "rule": ("ema", "debiased")}
    for name, allowed in choices.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(allowed)}")
    if not 0 < config.data_variance < math.inf:
        raise ValueError(f"data_variance is {config.data_variance!r}, it must be a positive number")
    scale = config.scale
    if scale not in ("learned", "predicted") and (isinstance(scale, (str, bool)) or not 0 < scale < math.inf):
        raise ValueError(f"scale is {scale!r}, it must be 'learned', 'predicted' or a positive number")
    groups = getattr(config, "groups", 1)
    if config.dim % groups:
        raise ValueError(
            f"dim {config.dim} cannot be cut into {groups} equal groups; make dim a multiple of groups"
        )


def check_pictures(x: Tensor, channels: int, stride: int) -> None:
    """Refuses what a model cannot take, naming what came, what was expected and the remedy."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, {channels}, H, W] (channels first)")
    if not x.is_floating_point():
        raise TypeError(
            f"x has dtype {x.dtype}, expected floats in [-0.5, 0.5]; vqfast.models.pixels_to_float(x) makes "
            "them"
        )
    height, width = x.shape[2:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"x is {height}x{width} pixels, but height and width must be positive multiples of {stride} for "
            f"this model; crop it, or vqfast.models.pad_to_multiple(x, {stride}) pads it"
        )


@dataclass(frozen=True)
class PictureConfig:
    """What all models of pictures share.

    Attributes:
        in_channels: of the picture.
        hidden, residual_hidden, residual_layers: widths and depth of encoder and decoder.
        stages: 4x4 stride-2 convolutions; the (finest) latents are 2**stages times smaller than the picture.
        likelihood, data_variance, scale: see `Likelihood`. The default variance is about that of natural
            pictures, and puts the squared error on a par with the quantizer's losses.
    """

    in_channels: int = 3
    hidden: int = 128
    residual_hidden: int = 32
    residual_layers: int = 2
    stages: int = 2
    likelihood: str = "mse"
    data_variance: float = NATURAL_VARIANCE
    scale: str | float = "learned"


@dataclass(frozen=True)
class CodingConfig(PictureConfig):
    """What the models with codes share, whatever the number of their levels. The defaults are Sonnet's CIFAR-10 example
    except for its debiased update rule.

    Attributes:
        quantizer: "ema" (the codebook follows moving averages) or "loss" (it follows the gradient of eq. 3).
        commitment_weight: beta.
        metric: "l2", "cosine" or "dot".
        decay, eps, rule: of the moving averages; rule "debiased" is Sonnet's. Unused by "loss".
        revive_below: codes whose cluster size falls under it are replaced by encoder outputs; 0: never.
        auto_update: the codebook moves in every training forward; False: when `update_()` is called.
    """

    quantizer: str = "ema"
    commitment_weight: float = 0.25
    metric: str = "l2"
    decay: float = 0.99
    eps: float = 1e-5
    rule: str = "ema"
    revive_below: float = 0.0
    auto_update: bool = True


@dataclass(frozen=True)
class VQVAEConfig(CodingConfig):
    """Settings of a `VQVAE`, beyond those of `CodingConfig`.

    Attributes:
        dim: channels of the latents; `groups` cuts them into equal parts, each with a codebook of its own.
        codebook_size: K, codes per group.
    """

    dim: int = 64
    codebook_size: int = 512
    groups: int = 1

    def __post_init__(self) -> None:
        check_settings(self)


class VQVAE(PretrainedModel):
    """A vector-quantized autoencoder for pictures.

    z = pre_quantizer(encoder(x)); q = nearest codes; reconstruction = decoder(q);
    loss = reconstruction_loss + codebook_loss + beta * commitment_loss, without the codebook loss when the
    codebook follows moving averages.

    Shapes:
        x: [B, in_channels, H, W] in [-0.5, 0.5], H and W multiples of `stride`.
        indices: [B, H / stride, W / stride], or [B, groups, H / stride, W / stride] when groups > 1.

    Args:
        config: a `VQVAEConfig`; None for the defaults.
        **fields: settings by name, in place of or over those of `config`.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), eq. 3, 4.1.
    """

    config_class = VQVAEConfig

    def __init__(self, config: VQVAEConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.likelihood = Likelihood(c.likelihood, c.in_channels, c.data_variance, c.scale)
        body = (c.hidden, c.residual_hidden, c.residual_layers, c.stages)
        self.encoder = Encoder(c.in_channels, *body)
        self.pre_quantizer = nn.Conv2d(c.hidden, c.dim, 1)
        self.quantizer = make_quantizer(c)
        self.decoder = Decoder(c.dim, self.likelihood.decoder_channels, *body)

    @property
    def stride(self) -> int:
        """Height and width of a picture must be multiples of it."""
        return 2**self.config.stages

    @property
    def quantizers(self) -> list[nn.Module]:
        """The quantizer layers, one per level."""
        return [self.quantizer]

    def forward(self, x: Tensor) -> ModelOutput:
        """Encodes, quantizes, decodes and scores a batch; in training the codebook moves along.

        Raises:
            ValueError: wrong rank, number of channels, or a size that is no multiple of `stride`.
            TypeError: x is not floating.
        """
        level = self.quantizer(self._latents(x))
        output = self.decoder(level.quantized)
        reconstruction_loss = self.likelihood.nll(output, x).mean()
        return ModelOutput(
            self.likelihood.mean(output), reconstruction_loss + level.loss, reconstruction_loss, [level]
        )

    def _latents(self, x: Tensor) -> Tensor:
        check_pictures(x, self.config.in_channels, self.stride)
        return self.pre_quantizer(self.encoder(x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """The codes of pictures, one int64 tensor per level; changes no state. Raises as `forward`."""
        return [self.quantizer.encode(self._latents(x))]

    @torch.no_grad()
    def decode(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The pictures of codes, as `encode` gave them.

        Returns:
            [B, in_channels, H, W] float, not clamped; `float_to_pixels` makes 8-bit pictures of it.

        Raises:
            ValueError: not exactly one level. IndexError: an index outside the codebook.
        """
        levels = [indices] if isinstance(indices, Tensor) else list(indices)
        if len(levels) != 1:
            raise ValueError(f"indices has {len(levels)} levels, this model has one")
        return self.likelihood.mean(self.decoder(self.quantizer.decode(levels[0])))

    @torch.no_grad()
    def sample(self, count: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """Pictures of codes drawn from the uniform prior that the model is trained under.

        Args:
            count, height, width: of the pictures, in pixels.
            generator: on the CPU; the same on every device.

        Returns:
            [count, in_channels, height, width] float.
        """
        device = self.pre_quantizer.weight.device
        shapes = self.latent_shapes(height, width)
        draw = [
            torch.randint(self.config.codebook_size, (count, *shape), generator=generator) for shape in shapes
        ]
        return self.decode([level.to(device) for level in draw])

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """The shape of each level's indices for one picture, without the batch axis."""
        if height % self.stride or width % self.stride:
            raise ValueError(f"{height}x{width} is not a multiple of {self.stride} in both directions")
        grid = (height // self.stride, width // self.stride)
        return [grid if self.config.groups == 1 else (self.config.groups, *grid)]

    def bits_per_pixel(self) -> float:
        """Size of the codes under the uniform prior, log2 K each, in bits per pixel of the picture."""
        return self.config.groups * math.log2(self.config.codebook_size) / self.stride**2

    @torch.no_grad()
    def bits_per_dim(self, x: Tensor, scale: float | None = None) -> BitsPerDim:
        """The bound -log2 p(x | q(x)) - log2 p(q) per dimension, exact for 8-bit pictures, p(q) uniform.

        Args:
            x: [B, in_channels, H, W] in [-0.5, 0.5].
            scale: see `Likelihood.bits`; None for likelihood "discretized_logistic".

        Returns:
            Bits per dimension, float64, mean over the batch.

        Raises:
            ValueError: as `forward`, or `scale` does not go with the likelihood.
        """
        q = self.quantizer.decode(self.quantizer.encode(self._latents(x)))
        reconstruction = self.likelihood.bits(self.decoder(q), x, scale)
        latents = reconstruction.new_tensor(self.bits_per_pixel() / self.config.in_channels)
        return BitsPerDim(reconstruction + latents, reconstruction, latents)

    @torch.no_grad()
    def init_codebooks_(self, x: Tensor) -> None:
        """Sets the codebook by k-means on the encoder's outputs for these pictures."""
        self.quantizer.init_codebook_(self._latents(x))

    def update_(self) -> None:
        """Calls every quantizer's `update_()`: once per optimizer step when they do not do it themselves."""
        self.quantizer.update_()


def make_quantizer(config: VQVAEConfig) -> nn.Module:
    """The quantizer layer that a configuration names, for channels-first latents."""
    shared = dict(
        commitment_weight=config.commitment_weight,
        metric=config.metric,
        groups=config.groups,
        channel_dim=1,
        revive_below=config.revive_below,
        auto_update=config.auto_update,
    )
    if config.quantizer == "loss":
        return VectorQuantizer(config.dim, config.codebook_size, **shared)
    return VectorQuantizerEMA(
        config.dim, config.codebook_size, decay=config.decay, eps=config.eps, rule=config.rule, **shared
    )

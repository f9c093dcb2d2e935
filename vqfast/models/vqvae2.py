"""VQ-VAE-2: a hierarchy of quantized levels; every finer level sees what the coarser ones decode to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quantize import Quantized
from .blocks import Decoder, Encoder
from .likelihood import Likelihood
from .pretrained import PretrainedModel
from .vqvae import BitsPerDim, CodingConfig, ModelOutput, VQVAEConfig, check_pictures, make_quantizer


@dataclass(frozen=True)
class VQVAE2Config(CodingConfig):
    """Settings of a `VQVAE2`, beyond those of `CodingConfig`. Tuples run from the finest level (bottom) to the coarsest
    (top), as everywhere; each level's latents are half as large as those of the level below it.

    Attributes:
        residual_hidden: the paper's 64.
        dims: channels D of each level's latents; as many levels as entries.
        codebook_sizes: K of each level.
    """

    residual_hidden: int = 64
    dims: tuple[int, ...] = (64, 64)
    codebook_sizes: tuple[int, ...] = (512, 512)

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.codebook_sizes) or not self.dims:
            raise ValueError(
                f"dims {self.dims} and codebook_sizes {self.codebook_sizes} must have one entry per level, finest level first"
            )
        for level in range(len(self.dims)):
            self.level(level)

    def level(self, index: int) -> VQVAEConfig:
        """The settings of one level as those of a one-level model; checks them."""
        shared = {field.name: getattr(self, field.name) for field in fields(CodingConfig)}
        return VQVAEConfig(**shared, dim=self.dims[index], codebook_size=self.codebook_sizes[index])


class VQVAE2(PretrainedModel):
    """A hierarchical vector-quantized autoencoder for pictures.

        h_0 = encoder_0(x), h_i = encoder_i(h_{i-1})                       each half as large as the one before
        q_top = quantize(W h_top);  q_i = quantize(W [h_i, decoder_{i+1}([q_{i+1}, coarser ones enlarged])])
        reconstruction = decoder_0([q_0, coarser ones enlarged]);  loss = reconstruction_loss + sum of the levels'
        losses

    Shapes:
        x: [B, in_channels, H, W] in [-0.5, 0.5], H and W multiples of `stride`.
        indices of level i: [B, H / 2**(stages + i), W / 2**(stages + i)].

    Args:
        config: a `VQVAE2Config`; None for the defaults, the two levels of the paper's ImageNet model.
        **settings: by name, in place of or over those of `config`.

    Source: Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (arXiv 1906.00446), section 3.1 and
    algorithm 1.
    """

    config_class = VQVAE2Config

    def __init__(self, config: VQVAE2Config | None = None, **settings: Any):
        super().__init__(config, **settings)
        c = self.config
        self.likelihood = Likelihood(c.likelihood, c.in_channels, c.data_variance, c.scale)
        body, count = (c.hidden, c.residual_hidden, c.residual_layers), len(c.dims)
        stages = [c.stages] + [1] * (count - 1)
        inputs = [c.in_channels] + [c.hidden] * (count - 1)
        # Decoder i takes the codes of level i and all coarser ones; decoder 0 makes the picture, the others features.
        seen = [sum(c.dims[i:]) for i in range(count)]
        outputs = [self.likelihood.decoder_channels] + [c.hidden] * (count - 1)
        self.encoders = nn.ModuleList(Encoder(n, *body, s) for n, s in zip(inputs, stages))
        self.pre_quantizers = nn.ModuleList(
            nn.Conv2d(c.hidden * (1 if i == count - 1 else 2), c.dims[i], 1) for i in range(count)
        )
        self.quantizers_ = nn.ModuleList(make_quantizer(c.level(i)) for i in range(count))
        self.decoders = nn.ModuleList(Decoder(n, m, *body, s) for n, m, s in zip(seen, outputs, stages))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(n, n, 4, stride=2, padding=1) for n in seen[1:])

    @property
    def stride(self) -> int:
        """Height and width of a picture must be multiples of it."""
        return 2 ** (self.config.stages + len(self.config.dims) - 1)

    @property
    def quantizers(self) -> list[nn.Module]:
        """The quantizer layers, finest level first."""
        return list(self.quantizers_)

    def forward(self, x: Tensor) -> ModelOutput:
        """Encodes, quantizes, decodes and scores a batch; in training the codebooks move along (see `vqfast.nn`).

        Raises:
            ValueError: wrong rank, number of channels, or a size that is no multiple of `stride`.
            TypeError: x is not floating.
        """
        levels: list[Quantized] = []

        def quantize(index: int, z: Tensor) -> Tensor:
            levels.insert(0, self.quantizers_[index](z))
            return levels[0].quantized

        output = self._descend(self._features(x), quantize)
        reconstruction_loss = self.likelihood.nll(output, x).mean()
        loss = reconstruction_loss + sum(level.loss for level in levels)
        return ModelOutput(self.likelihood.mean(output), loss, reconstruction_loss, levels)

    def _features(self, x: Tensor) -> list[Tensor]:
        check_pictures(x, self.config.in_channels, self.stride)
        features = []
        for encoder in self.encoders:
            x = encoder(x)
            features.append(x)
        return features

    def _descend(self, features: Sequence[Tensor] | None, quantize) -> Tensor:
        """From the coarsest level to the picture; quantize(index, z) gives a level's codes (z is None without
        features)."""
        above = decoded = None
        for index in reversed(range(len(self.encoders))):
            z = None
            if features is not None:
                seen = [features[index]] if decoded is None else [features[index], decoded]
                z = self.pre_quantizers[index](torch.cat(seen, dim=1))
            codes = quantize(index, z)
            above = codes if above is None else torch.cat([codes, self.enlarge[index](above)], dim=1)
            if features is not None or index == 0:
                decoded = self.decoders[index](above)
        return decoded

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """The codes of pictures, one int64 tensor per level, finest first; changes no state. Raises as `forward`."""
        found: list[Tensor] = []

        def quantize(index: int, z: Tensor) -> Tensor:
            found.insert(0, self.quantizers_[index].encode(z))
            return self.quantizers_[index].decode(found[0])

        self._descend(self._features(x), quantize)
        return found

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """The pictures of codes, as `encode` gave them: one tensor per level, finest first.

        Returns:
            [B, in_channels, H, W] float, not clamped; `float_to_pixels` makes 8-bit pictures of it.

        Raises:
            ValueError: wrong number of levels, or sizes that do not halve from level to level. IndexError: an
            index outside its codebook.
        """
        return self.likelihood.mean(self._decode(indices))

    def _decode(self, indices: Sequence[Tensor]) -> Tensor:
        levels = [indices] if isinstance(indices, Tensor) else list(indices)
        if len(levels) != len(self.encoders):
            raise ValueError(f"indices has {len(levels)} levels, this model has {len(self.encoders)}, finest first")
        for fine, coarse in zip(levels, levels[1:]):
            if fine.shape[0] != coarse.shape[0] or any(f != 2 * c for f, c in zip(fine.shape[1:], coarse.shape[1:])):
                shapes = [list(level.shape) for level in levels]
                raise ValueError(
                    f"indices have shapes {shapes}; each level must be half of the one before it, finest first"
                )
        return self._descend(None, lambda index, z: self.quantizers_[index].decode(levels[index]))

    @torch.no_grad()
    def sample(self, count: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """Pictures of codes drawn from the uniform prior that the model is trained under; see `HierarchicalPrior`
        for a better one.

        Args:
            count, height, width: of the pictures, in pixels.
            generator: on the CPU; the same on every device.
        """
        device = self.pre_quantizers[0].weight.device
        draw = [
            torch.randint(size, (count, *shape), generator=generator).to(device)
            for size, shape in zip(self.config.codebook_sizes, self.latent_shapes(height, width))
        ]
        return self.decode(draw)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """The shape of each level's indices for one picture, without the batch axis, finest first."""
        if height % self.stride or width % self.stride:
            raise ValueError(f"{height}x{width} is not a multiple of {self.stride} in both directions")
        strides = [2 ** (self.config.stages + i) for i in range(len(self.encoders))]
        return [(height // s, width // s) for s in strides]

    def bits_per_pixel(self) -> float:
        """Size of the codes of all levels under the uniform prior, in bits per pixel of the picture."""
        return sum(math.log2(size) / 4 ** (self.config.stages + i) for i, size in enumerate(self.config.codebook_sizes))

    @torch.no_grad()
    def bits_per_dim(self, x: Tensor, scale: float | None = None) -> BitsPerDim:
        """The bound -log2 p(x | codes) - log2 p(codes) per dimension, p(codes) uniform; arguments and errors as
        `VQVAE.bits_per_dim`."""
        reconstruction = self.likelihood.bits(self._decode(self.encode(x)), x, scale)
        latents = reconstruction.new_tensor(self.bits_per_pixel() / self.config.in_channels)
        return BitsPerDim(reconstruction + latents, reconstruction, latents)

    @torch.no_grad()
    def init_codebooks_(self, x: Tensor) -> None:
        """Sets the codebooks by k-means on the encoder's outputs for these pictures, coarsest level first."""

        def quantize(index: int, z: Tensor) -> Tensor:
            layer = self.quantizers_[index]
            layer.init_codebook_(z)
            return layer.decode(layer.encode(z))

        self._descend(self._features(x), quantize)

    def update_(self) -> None:
        """Calls every quantizer's `update_()`: once per optimizer step when they do not update by themselves."""
        for quantizer in self.quantizers_:
            quantizer.update_()


"""A plain VAE with the VQ-VAE's encoder and decoder, for the paper's comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _border
from .blocks import Decoder, Encoder
from .likelihood import Likelihood
from .pretrained import PretrainedModel
from .vqvae import BitsPerDim, PictureConfig, check_pictures, check_settings


@_border.exportable
class VAEOutput(NamedTuple):
    """As `ModelOutput`; `levels` is empty, `kl` the Kullback-Leibler term in nats per picture dimension."""

    reconstruction: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    levels: list
    kl: Tensor


@dataclass(frozen=True)
class VAEConfig(PictureConfig):
    """Settings of a `VAE`, beyond those of `PictureConfig`: `dim` is the latents' channels, and the likelihood one of 8-bit
    levels, so that the loss bounds bits.
    """

    dim: int = 64
    likelihood: str = "discretized_logistic"

    def __post_init__(self) -> None:
        check_settings(self)


class VAE(PretrainedModel):
    """An autoencoder with Gaussian latents of the same spatial shape as the VQ-VAE's.

    q(z | x) = N(mean, exp(log_variance)), p(z) = N(0, 1); loss = -log p(x | z) + KL(q || p), both per picture
    dimension, so that with a likelihood of 8-bit levels loss / ln 2 bounds the bits per dimension from above.

    Shapes:
        x: [B, in_channels, H, W] in [-0.5, 0.5], H and W multiples of `stride`.
        z: [B, dim, H / stride, W / stride].

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (arXiv 1312.6114), eq. 10.
    """

    config_class = VAEConfig

    def __init__(self, config: VAEConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.likelihood = Likelihood(c.likelihood, c.in_channels, c.data_variance, c.scale)
        body = (c.hidden, c.residual_hidden, c.residual_layers, c.stages)
        self.encoder = Encoder(c.in_channels, *body)
        self.posterior = nn.Conv2d(c.hidden, 2 * c.dim, 1)
        self.decoder = Decoder(c.dim, self.likelihood.decoder_channels, *body)

    @property
    def stride(self) -> int:
        """Height and width of a picture must be multiples of it."""
        return 2**self.config.stages

    @property
    def quantizers(self) -> list[nn.Module]:
        """None: a VAE has no codes. Here so that one trainer serves both models."""
        return []

    def forward(self, x: Tensor) -> VAEOutput:
        """Encodes, samples (in eval mode: takes the mean), decodes and scores; raises as `VQVAE.forward`."""
        mean, log_variance = self._posterior(x)
        z = _sample(mean, log_variance) if self.training else mean
        output = self.decoder(z.to(mean.dtype))
        reconstruction_loss = self.likelihood.nll(output, x).mean()
        kl = _kl(mean, log_variance) / x.numel()
        return VAEOutput(self.likelihood.mean(output), reconstruction_loss + kl, reconstruction_loss, [], kl)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_pictures(x, self.config.in_channels, self.stride)
        mean, log_variance = self.posterior(self.encoder(x)).float().chunk(2, dim=1)
        # A log-variance outside this range is either numerically zero noise or drowns the prior.
        return mean, log_variance.clamp(-20.0, 10.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean. Shapes: [B, in_channels, H, W] -> [B, dim, h, w]."""
        return self._posterior(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The pictures of latents. Shapes: [B, dim, h, w] -> [B, in_channels, H, W], not clamped."""
        return self.likelihood.mean(self.decoder(z))

    @torch.no_grad()
    def sample(self, count: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """Pictures of latents drawn from N(0, 1); arguments and result as `VQVAE.sample`."""
        if height % self.stride or width % self.stride:
            raise ValueError(f"{height}x{width} is not a multiple of {self.stride} in both directions")
        shape = (count, self.config.dim, height // self.stride, width // self.stride)
        return self.decode(torch.randn(shape, generator=generator).to(self.posterior.weight))

    @torch.no_grad()
    def bits_per_dim(
        self,
        x: Tensor,
        scale: float | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> BitsPerDim:
        """The evidence lower bound in bits per dimension: `latents` is the KL term.

        Args:
            x: [B, in_channels, H, W] in [-0.5, 0.5].
            scale: see `Likelihood.bits`.
            samples: posterior samples whose bounds are averaged.
            generator: on the CPU, for the posterior samples.
        """
        mean, log_variance = self._posterior(x)
        draws = [
            self.likelihood.bits(self.decoder(_sample(mean, log_variance, generator)), x, scale)
            for _ in range(samples)
        ]
        reconstruction = torch.stack(draws).mean()
        latents = _kl(mean.double(), log_variance.double()) / (x.numel() * math.log(2))
        return BitsPerDim(reconstruction + latents, reconstruction, latents)

    def init_codebooks_(self, x: Tensor) -> None:
        """Nothing: there is no codebook."""

    def update_(self) -> None:
        """Nothing: there is no codebook."""


def _sample(mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw from N(mean, exp(log_variance)), differentiable in both."""
    if generator is None:
        noise = torch.randn_like(mean)
    else:
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + noise * torch.exp(0.5 * log_variance)


def _kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over everything."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()

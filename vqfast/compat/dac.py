"""Faces of the Descript Audio Codec's quantizers (dac.nn.quantize)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat import _parts


def normalized_lookup(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices [B, T] of the codes nearest to latents [B, D, T] once both are l2-normalised."""
    return _parts.lookup(F.normalize(latents.transpose(1, 2), dim=-1), F.normalize(codebook, dim=-1))


class VectorQuantizeMethods:
    """decode_latents of `VectorQuantize`: the search is on normalised vectors, the codes come back as they are."""

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D, T] -> (codes [B, D, T], indices [B, T])."""
        indices = normalized_lookup(latents, self.codebook.weight)
        return self.decode_code(indices), indices


class _WeightNormConv1d(nn.Module):
    """1 x 1 convolution with weight v g / |v|, under the names of torch's old weight_norm: weight_g [C, 1, 1], weight_v [C, D, 1]."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        plain = nn.Conv1d(channels_in, channels_out, 1)
        self.bias = plain.bias
        self.weight_g = nn.Parameter(plain.weight.detach().norm(dim=(1, 2), keepdim=True))
        self.weight_v = plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, torch._weight_norm(self.weight_v, self.weight_g, 0), self.bias)


class VectorQuantize(VectorQuantizeMethods, nn.Module):
    """One level: projection to codebook_dim, search on the sphere, projection back.

    forward(z [B, D, T]) -> (z_q [B, D, T], commitment_loss [B], codebook_loss [B], indices [B, T], z_e [B, codebook_dim, T]).

    State: in_proj.{bias, weight_g, weight_v}, out_proj.*, codebook.weight [K, codebook_dim].
    """

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = _WeightNormConv1d(input_dim, codebook_dim)
        self.out_proj = _WeightNormConv1d(codebook_dim, input_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        z_e = self.in_proj(z)
        codes, indices = self.decode_latents(z_e)
        commitment_loss = F.mse_loss(z_e, codes.detach(), reduction="none").mean([1, 2])
        codebook_loss = F.mse_loss(codes, z_e.detach(), reduction="none").mean([1, 2])
        return self.out_proj(_parts.straight_through(z_e, codes)), commitment_loss, codebook_loss, indices, z_e

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Indices [...] -> codes [..., codebook_dim]."""
        return F.embedding(embed_id, self.codebook.weight)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        """Indices [B, T] -> codes [B, codebook_dim, T]."""
        return self.embed_code(embed_id).transpose(1, 2)


class ResidualVectorQuantize(nn.Module):
    """DAC's residual quantizer; forward returns (z, codes [B, Q, T], latents [B, Q codebook_dim, T], commitment and codebook loss []).

    Args:
        input_dim: D. n_codebooks: Q. codebook_size: K. codebook_dim: of every level, or a list. quantizer_dropout: share of the
            samples of a training batch that use a random number of levels only.

    State: quantizers.{i}.* (see `VectorQuantize`).

    Source: https://github.com/descriptinc/descript-audio-codec, dac/nn/quantize.py; Kumar et al. 2023.
    """

    def __init__(
        self,
        input_dim: int = 512,
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | list = 8,
        quantizer_dropout: float = 0.0,
    ):
        super().__init__()
        dims = [codebook_dim] * n_codebooks if isinstance(codebook_dim, int) else list(codebook_dim)
        self.n_codebooks, self.codebook_dim, self.codebook_size = n_codebooks, dims, codebook_size
        self.quantizers = nn.ModuleList(VectorQuantize(input_dim, codebook_size, dim) for dim in dims)
        self.quantizer_dropout = quantizer_dropout

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z [B, D, T]; n_quantizers counts in evaluation only, as in the peer."""
        levels = self._levels(z, n_quantizers)  # [B]
        total, rest, commitment, codebook, codes, latents = 0, z, 0, 0, [], []
        for i, quantizer in enumerate(self.quantizers):
            if not self.training and n_quantizers is not None and i >= n_quantizers:
                break
            z_q, commitment_loss, codebook_loss, found, z_e = quantizer(rest)
            used = i < levels
            total = total + z_q * used[:, None, None]
            rest = rest - z_q
            commitment = commitment + (commitment_loss * used).mean()
            codebook = codebook + (codebook_loss * used).mean()
            codes.append(found)
            latents.append(z_e)
        return total, torch.stack(codes, dim=1), torch.cat(latents, dim=1), commitment, codebook

    def _levels(self, z: Tensor, asked: int | None) -> Tensor:
        batch = z.shape[0]
        if not self.training:
            return torch.full((batch,), self.n_codebooks if asked is None else asked, device=z.device)
        drawn = torch.randint(1, self.n_codebooks + 1, (batch,))
        shortened = torch.arange(batch) < int(batch * self.quantizer_dropout)
        return torch.where(shortened, drawn, self.n_codebooks).to(z.device)

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, q, T] -> (z [B, D, T], latents [B, sum of dims, T], codes)."""
        latents = [quantizer.decode_code(codes[:, i]) for i, quantizer in zip(range(codes.shape[1]), self.quantizers)]
        z = sum(quantizer.out_proj(latent) for quantizer, latent in zip(self.quantizers, latents))
        return z, torch.cat(latents, dim=1), codes

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, sum of dims, T] of the first levels -> (z, quantized latents, codes); a rest that fills no level is left out."""
        z, kept, codes, start = 0, [], [], 0
        for quantizer in self.quantizers:
            stop = start + quantizer.codebook_dim
            if stop > latents.shape[1]:
                break
            latent, found = quantizer.decode_latents(latents[:, start:stop])
            z = z + quantizer.out_proj(latent)
            kept.append(latent)
            codes.append(found)
            start = stop
        return z, torch.cat(kept, dim=1), torch.stack(codes, dim=1)

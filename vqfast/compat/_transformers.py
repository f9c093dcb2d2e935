"""Methods that `convert` puts into Hugging Face transformers' quantizers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vqfast.compat import _parts
from vqfast.compat.dac import normalized_lookup


class EuclideanCodebookMethods:
    """quantize of the Encodec, Mimi, Xcodec and HiggsAudioV2Tokenizer codebooks; rows [N, D] -> indices [N]."""

    def quantize(self, hidden_states: Tensor) -> Tensor:
        return _parts.lookup(hidden_states, self.embed)


class DacVectorQuantizeMethods:
    """decode_latents of DacVectorQuantize: [B, D, T] -> (codes [B, D, T], indices [B, T])."""

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        indices = normalized_lookup(hidden_states, self.codebook.weight)
        return self.codebook(indices).transpose(1, 2), indices


class ImageQuantizerMethods:
    """forward of the Chameleon and Janus quantizers: [B, D, H, W] -> (quantized, loss, flat indices); beta on the codebook term."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = _parts.image_rows(hidden_state)
        indices = _parts.lookup(z.flatten(0, -2), self.embedding.weight)
        return _finish(z, self.embedding(indices).view(z.shape), self.beta, indices)


class SphericalImageQuantizerMethods:
    """forward of GlmImageVQVAEVectorQuantizer: rows and codes are l2-normalised first, and so is what it returns."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.normalize(_parts.image_rows(hidden_state), dim=-1)
        codebook = F.normalize(self.embedding.weight, dim=-1)
        indices = _parts.lookup(z.flatten(0, -2), codebook)
        return _finish(z, codebook[indices].view(z.shape), self.beta, indices)


class VideoQuantizerMethods:
    """forward of Emu3VQVAEVectorQuantizer: [B, T, D, H, W] -> indices [B, T, H, W]."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return _parts.lookup(hidden_state.movedim(2, -1), self.embedding.weight)


def _finish(z: Tensor, codes: Tensor, beta: float, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    into_z, into_codes = _parts.mean_errors(z, codes)
    return _parts.image(_parts.straight_through(z, codes)), into_z + beta * into_codes, indices

"""What the layer tests share: small layers on integer-valued codes, and the layouts that a layer accepts."""

from __future__ import annotations

import cases
import torch

from vqfast.nn import ResidualVectorQuantizer, VectorQuantizer, VectorQuantizerEMA

KINDS = {"parameter": VectorQuantizer, "ema": VectorQuantizerEMA}
DIM, CODES = 6, 16

# name: shape of z with DIM channels, channel_dim
LAYOUTS = {
    "rows": ((11, DIM), -1),
    "sequence": ((3, 5, DIM), -1),
    "sequence_first": ((3, DIM, 5), 1),
    "image": ((2, DIM, 4, 5), 1),
    "image_last": ((2, 4, 5, DIM), -1),
    "video": ((2, DIM, 3, 4, 5), 1),
    "video_last": ((2, 3, 4, 5, DIM), -1),
}


def make(kind: str, codebook: torch.Tensor | None = None, **options):
    """A layer of `kind` in training mode, with a known codebook."""
    torch.manual_seed(0)
    dim, size = options.pop("dim", DIM), options.pop("codebook_size", CODES)
    layer = (ResidualVectorQuantizer if kind == "residual" else KINDS[kind])(dim, size, **options)
    if codebook is None:
        codebook = cases.normal(*layer.codebook.shape, seed=90)
    layer.set_codebook_(codebook.reshape(layer.codebook.shape))
    return layer.train()


def codes_of(layer) -> torch.Tensor:
    """[G, K, D], a copy."""
    return layer.codebook.detach().reshape(-1, *layer.codebook.shape[-2:]).clone()


def rows_of(z: torch.Tensor, channel_dim: int, groups: int = 1) -> torch.Tensor:
    """[B, G, N, D / G], as the border sees z."""
    last = z.movedim(channel_dim, -1)
    flat = last.reshape(last.shape[0], -1, last.shape[-1]) if last.dim() > 2 else last[:, None]
    return flat.unflatten(-1, (groups, -1)).transpose(1, 2)


def index_shape(z: torch.Tensor, channel_dim: int, groups: int = 1) -> tuple[int, ...]:
    rest = z.movedim(channel_dim, -1).shape[:-1]
    return (rest[0], groups, *rest[1:]) if groups > 1 else tuple(rest)


def state_of(layer) -> dict[str, torch.Tensor]:
    """A copy of all that training may change."""
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def learned(layer) -> dict[str, torch.Tensor]:
    """The state without the count of calls: what an empty step must leave alone."""
    return {name: t for name, t in state_of(layer).items() if t.is_floating_point()}

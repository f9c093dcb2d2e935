"""A toy image tokenizer that uses vector_quantize_pytorch, moved to vqfast by its import.

    python examples/migrate_vector_quantize_pytorch.py

The change in a project of your own is one line:

    -from vector_quantize_pytorch import VectorQuantize
    +from vqfast.compat.vector_quantize_pytorch import VectorQuantize

Needs: pip install vector-quantize-pytorch
"""

from __future__ import annotations

import argparse

import torch
import vector_quantize_pytorch as old_library
from side_by_side import milliseconds, report
from torch import nn

import vqfast.compat.vector_quantize_pytorch as new_library


class Tokenizer(nn.Module):
    """32 channels at a quarter of the resolution, one code per position."""

    def __init__(self, library, codebook_size: int):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 4, 2, 1))
        self.quantizer = library.VectorQuantize(32, codebook_size, accept_image_fmap=True, decay=0.99)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1))

    def forward(self, x):
        quantized, indices, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, loss


def training_step(model, x):
    reconstruction, indices, loss = model(x)
    ((reconstruction - x).square().mean() + loss).backward()
    model.zero_grad()
    return indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=8192, help="size of the codebook")
    parser.add_argument("--pictures", type=int, default=8, help="64 x 64 pictures per batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    options = parser.parse_args()

    x = nn.functional.interpolate(torch.randn(options.pictures, 3, 16, 16), size=64, mode="bicubic")
    old, new = (Tokenizer(library, options.codes) for library in (old_library, new_library))
    with torch.no_grad():  # codes where the encoder's outputs are, as training would put them
        rows = old.encoder(x).movedim(1, -1).reshape(-1, 32)
        codes = rows[torch.randint(len(rows), (options.codes,))] + 0.1 * rows.std() * torch.randn(options.codes, 32)
        old.quantizer.codebook = codes
        old.quantizer._codebook.embed_avg.copy_(old.quantizer._codebook.embed)
    new.load_state_dict(old.state_dict())  # a checkpoint of the old model, strictly

    with torch.no_grad():
        report(lambda: old.eval()(x)[1], lambda: new.eval()(x)[1], "tokenize", options.repeats)
    old.train(), new.train()
    spent = milliseconds({"old": lambda: training_step(old, x), "new": lambda: training_step(new, x)}, options.repeats)
    print(f"training step: old {spent['old']:.1f} ms, new {spent['new']:.1f} ms")


if __name__ == "__main__":
    main()

"""diffusers' VQModel, as it is and after vqfast.convert, with random weights.

    python examples/migrate_diffusers.py

The change in a project of your own is one line, after the model is built:

    +vqfast.convert(model)

Needs: pip install diffusers
"""

from __future__ import annotations

import argparse
import copy

import torch
from diffusers import VQModel
from side_by_side import milliseconds, report

import vqfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=8192, help="size of the codebook")
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures")
    parser.add_argument("--pictures", type=int, default=2, help="pictures per batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    options = parser.parse_args()

    torch.manual_seed(0)
    old = VQModel(num_vq_embeddings=options.codes, latent_channels=4, block_out_channels=(32,), norm_num_groups=8)
    x = torch.randn(options.pictures, 3, options.size, options.size)
    with torch.no_grad():
        latents = old.encode(x).latents
        weight = old.quantize.embedding.weight
        weight.normal_().mul_(latents.std())  # codes on the scale of what they quantize
    new = copy.deepcopy(old)
    print(vqfast.convert(new))
    with torch.inference_mode():
        quantizers = old.quantize, new.quantize
        report(*((lambda q=q: q(latents)[2][2]) for q in quantizers), "quantizer alone", options.repeats)

    def training_step(model):
        reconstruction, loss = model(x, return_dict=False)
        ((reconstruction - x).square().mean() + loss).backward()
        model.zero_grad()

    spent = milliseconds({"old": lambda: training_step(old), "new": lambda: training_step(new)}, options.repeats)
    print(f"training step of the whole model: old {spent['old']:.1f} ms, new {spent['new']:.1f} ms")


if __name__ == "__main__":
    main()

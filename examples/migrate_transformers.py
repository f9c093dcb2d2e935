"""transformers' Encodec, as it is and after vqfast.convert, with random weights.

    python examples/migrate_transformers.py

The change in a project of your own is one line, after the model is built:

    +vqfast.convert(model)

Needs: pip install transformers
"""

from __future__ import annotations

import argparse
import copy

import torch
from side_by_side import report
from transformers import EncodecConfig, EncodecModel

import vqfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each sound, at 24 kHz")
    parser.add_argument("--batch", type=int, default=4, help="sounds per batch")
    parser.add_argument("--filters", type=int, default=32, help="channels of the encoder's first layer; 32 as published")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    options = parser.parse_args()

    torch.manual_seed(0)
    old = EncodecModel(EncodecConfig(num_filters=options.filters)).eval()
    sound = 0.1 * torch.randn(options.batch, 1, int(options.seconds * old.config.sampling_rate))
    with torch.inference_mode():
        hidden = old.encoder(sound)
        for layer in old.quantizer.layers:  # codes on the scale of what they quantize
            layer.codebook.embed.normal_().mul_(hidden.std())
        new = copy.deepcopy(old)
        print(vqfast.convert(new))
        quantizers = old.quantizer, new.quantizer
        report(*((lambda q=q: q.encode(hidden, 24.0)) for q in quantizers), "quantizer alone, 24 kbit/s", options.repeats)
        encoders = ((lambda m=m: m.encode(sound, bandwidth=24.0).audio_codes) for m in (old, new))
        report(*encoders, "whole encoder, 24 kbit/s", options.repeats)


if __name__ == "__main__":
    main()

"""``vqfast compress``: pictures as codes, entropy-coded with the prior's own probabilities."""

from __future__ import annotations

import torch

from vqfast._files import check_output_file
from vqfast.cli import UserError
from vqfast.cli._settings import Pictures
from vqfast.cli.encode import check_not_input, storable
from vqfast.models.compression import CompressedPicture, compress_levels, write_compressed
from vqfast.tokens import bits_for, model_hash
from vqfast.train.evaluate import encode_pictures, same_size_batches
from vqfast.train.priors import find_priors

EPILOG = """\
The codes come back exactly, on any machine; what is lost was lost by the model.
Needs constriction: pip install constriction."""


def add_arguments(parser) -> None:
    parser.add_argument("model", help="the model that encodes")
    parser.add_argument("prior", help="folder that vqfast train-prior wrote for it")
    parser.add_argument("pictures", help="a picture or a folder of pictures, any sizes")
    parser.add_argument("out", help="the file to write")


def run(args) -> int:
    model, prior, _ = find_priors(args.model, args.prior)
    check_output_file(args.out)
    pictures, found = Pictures(args.pictures, model.config.in_channels), []
    check_not_input(args.out, args.pictures)
    pixels = packed = payload = 0
    sizes = [quantizer.codebook_size for quantizer in model.quantizers]
    for names, batch in same_size_batches(storable(pictures)):
        with torch.no_grad():
            levels = encode_pictures(model, batch)[0]
        coded = compress_levels(prior, levels)
        for place, name in enumerate(names):
            parts = [(*level.shape[1:], stream) for level, stream in zip(levels, coded[place])]
            payload += 8 * sum(len(stream) for stream in coded[place])
            found.append(CompressedPicture(name, batch.shape[3], batch.shape[2], -1, parts))
        pixels += batch.shape[0] * batch.shape[2] * batch.shape[3]
        packed += sum(level.numel() * bits_for(size) for level, size in zip(levels, sizes))
    for line in pictures.report():
        print(line)
    if not found:
        raise UserError(f"none of the pictures in {args.pictures} can be read; there is no file")
    size = write_compressed(args.out, found, model=model_hash(model.state_dict()), prior=prior)
    print(
        f"{args.out}: {len(found)} pictures, {size:,} bytes, {8 * size / pixels:.4f} bits per pixel; the codes"
        f" alone take {payload / pixels:.4f}, without the prior {packed / pixels:.4f}"
    )
    return 0

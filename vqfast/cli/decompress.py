"""``vqfast decompress``: a file that ``vqfast compress`` wrote, back into pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vqfast._files import check_output_folder
from vqfast.cli import UserError
from vqfast.cli.decode import finish, picture_name
from vqfast.data import save_picture
from vqfast.models import float_to_pixels
from vqfast.models.compression import CompressedFileError, CompressedPicture, decompress_levels, read_compressed
from vqfast.tokens import model_hash
from vqfast.train.priors import find_priors

_BATCH_PIXELS = 1 << 18  # pictures of the same size are decoded together up to this many pixels


def add_arguments(parser) -> None:
    parser.add_argument("model", help="the model that encoded")
    parser.add_argument("prior", help="the prior that compressed")
    parser.add_argument("file", help="the compressed file")
    parser.add_argument("out", help="folder for the pictures (PNG, under their own names)")


def run(args) -> int:
    model, prior, _ = find_priors(args.model, args.prior)
    out, taken, refused, number = Path(args.out), {}, [], 0
    check_output_folder(out)
    try:
        pictures = read_compressed(args.file, model=model_hash(model.state_dict()), prior=prior)
        for group in batches(pictures):
            check_size(model, group[0], args.file)
            levels = decompress_levels(prior, [p.levels for p in group], torch.tensor([p.label for p in group]))
            with torch.no_grad():
                decoded = float_to_pixels(model.decode(levels))
            for picture, pixels in zip(group, decoded):
                place = picture_name(picture.name, taken)
                if place is None:
                    refused.append(picture.name)
                    continue
                save_picture(out / place, pixels[:, : picture.height, : picture.width])
                number += 1
    except CompressedFileError as error:
        raise UserError(str(error)) from None
    return finish(number, refused, args.file, out)


def batches(pictures: Sequence[CompressedPicture]) -> Iterator[list[CompressedPicture]]:
    """Neighbours of one size, so few at a time that memory does not grow with their number."""
    size = lambda p: (p.width, p.height, [part[:2] for part in p.levels])  # noqa: E731
    for _, group in itertools.groupby(pictures, key=size):
        group = list(group)
        count = max(1, _BATCH_PIXELS // max(1, group[0].width * group[0].height))
        yield from (group[begin : begin + count] for begin in range(0, len(group), count))


def check_size(model: torch.nn.Module, picture, source: str) -> None:
    stride = model.stride
    height, width = -(-picture.height // stride) * stride, -(-picture.width // stride) * stride
    expected = [tuple(shape) for shape in model.latent_shapes(height, width)] if height and width else []
    if [part[:2] for part in picture.levels] != expected:
        raise CompressedFileError(
            f"{source}: {picture.name!r} is {picture.width}x{picture.height}, its codes' shapes do not fit that"
        )

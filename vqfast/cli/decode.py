"""``vqfast decode``: a token file in, pictures out."""

from __future__ import annotations

import itertools
import os
from pathlib import Path, PurePosixPath

import torch

from vqfast._files import check_output_folder
from vqfast.cli import UserError
from vqfast.cli.encode import require_codes
from vqfast.data import save_picture
from vqfast.models import float_to_pixels
from vqfast.tokens import TokenFileError, TokenReader, TokenRecord, model_hash
from vqfast.train.ranks import pick_device
from vqfast.train.runs import find_model


def add_arguments(parser) -> None:
    parser.add_argument("model", help="the model that made the tokens")
    parser.add_argument("tokens", help="the token file")
    parser.add_argument("out", help="folder for the pictures (PNG, under their own names)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args) -> int:
    model, _, _ = find_model(Path(args.model))
    require_codes(model, args.model)
    out, number = Path(args.out), 0
    check_output_folder(out)
    with TokenReader(args.tokens) as reader:
        reader.require_model(model_hash(model.state_dict()))
        model.to(pick_device(args.device))
        taken: dict[PurePosixPath, str] = {}
        refused: list[str] = []
        try:
            for record in reader:
                place = picture_name(record.name, taken)
                if place is None:
                    refused.append(record.name)
                    continue
                save_picture(out / place, picture_of(model, record, args.tokens))
                number += 1
        except TokenFileError as error:
            raise TokenFileError(f"{error} ({number} pictures before that were written to {out})") from None
    return finish(number, refused, args.tokens, out)


def finish(number: int, refused: list[str], source: str, out: Path) -> int:
    """Says how many pictures were written and, as an error, which were not."""
    if refused:
        names = ", ".join(map(repr, refused[:5])) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        raise UserError(
            f"{source} has picture names that point outside the folder, so these are left out: {names} "
            f"({number} pictures are in {out})"
        )
    print(f"{number} pictures in {out}")
    return 0


def picture_name(name: str, taken: dict[PurePosixPath, str]) -> PurePosixPath | None:
    """Where a picture goes inside the folder: its own name with .png, never twice; None for a name that leaves the folder.

    ``taken`` says of each place given so far whether it is a "file" or a "folder".
    """
    path = PurePosixPath(name)
    foreign = os.name == "nt" and ("\\" in name or ":" in name)  # elsewhere these are letters like others
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name or foreign:
        return None
    folder = PurePosixPath()
    for part in path.parts[:-1]:
        # Beside the picture a.jpg, which became a.png, a folder a.png becomes a.png.2.
        folder = next(place for end in _endings() if taken.get(place := folder / f"{part}{end}") != "file")
        taken[folder] = "folder"
    names = itertools.chain([path.with_suffix(".png").name], (f"{path.name}{end}.png" for end in _endings()))
    place = next(folder / name for name in names if folder / name not in taken)  # a.jpg and a.png give a.png and a.png.png
    taken[place] = "file"
    return place


def _endings():
    """Nothing, then .2, .3, and so on."""
    yield ""
    yield from (f".{number}" for number in itertools.count(2))


@torch.no_grad()
def picture_of(model, record: TokenRecord, source: str) -> torch.Tensor:
    """The picture of one record, uint8 [C, H, W]; the record's shapes must be the model's for that size."""
    stride = model.stride
    height, width = -(-record.height // stride) * stride, -(-record.width // stride) * stride
    expected = [tuple(shape) for shape in model.latent_shapes(height, width)] if height and width else []
    if [level.shape for level in record.levels] != expected:
        raise TokenFileError(
            f"{source}: {record.name} has codes of shape {[level.shape for level in record.levels]}, a picture of "
            f"{record.width}x{record.height} pixels has {expected} with this model"
        )
    device = next(model.parameters()).device
    levels = [torch.from_numpy(level)[None].to(device) for level in record.levels]
    return float_to_pixels(model.decode(levels))[0, :, : record.height, : record.width].cpu()

"""``vqfast reconstruct``: each picture next to what the model makes of it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import torch

from vqfast._files import check_output_folder
from vqfast.cli import UserError
from vqfast.cli._settings import Pictures
from vqfast.cli.decode import picture_name
from vqfast.data import save_picture
from vqfast.train.evaluate import psnr, restore, squared_errors
from vqfast.train.ranks import pick_device
from vqfast.train.runs import find_model

_GAP = 4  # white columns between the two pictures


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a run's folder, a checkpoint file, or a folder from save_pretrained")
    parser.add_argument("pictures", help="a picture or a folder of pictures, any sizes")
    parser.add_argument("out", help="folder for the pairs: original left, reconstruction right (PNG)")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many pictures; 0: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args) -> int:
    if args.limit < 0:
        raise UserError(f"--limit is {args.limit}, but must be 0 or more")
    check_output_folder(args.out)
    source = Path(args.pictures)
    if os.path.realpath(args.out) == os.path.realpath(source if source.is_dir() else source.parent):
        raise UserError(f"{args.out} is where the pictures come from, and pairs would overwrite them; name another folder")
    model, _, _ = find_model(Path(args.model))
    model.to(pick_device(args.device))
    pictures, taken, ratios = Pictures(args.pictures, model.config.in_channels), dict[PurePosixPath, str](), []
    for name, picture in pictures:
        restored = restore(model, picture[None])[0][0]
        gap = torch.full((picture.shape[0], picture.shape[1], _GAP), 255, dtype=torch.uint8)
        save_picture(Path(args.out) / picture_name(name, taken), torch.cat([picture, gap, restored], dim=2))
        ratios += psnr(squared_errors(picture[None], restored[None])).tolist()
        if len(ratios) == args.limit:
            break
    for line in pictures.report():
        print(line)
    if not ratios:
        raise UserError(f"none of the pictures in {args.pictures} can be read")
    print(f"{len(ratios)} pairs in {args.out}; PSNR {sum(ratios) / len(ratios):.2f} dB")
    return 0

"""``vqfast encode``: pictures in, one token file out, however many pictures there are."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vqfast._files import check_output_file
from vqfast.cli import UserError
from vqfast.cli._settings import Pictures
from vqfast.data import find_pictures
from vqfast.tokens import TokenWriter, model_hash
from vqfast.train.evaluate import encode_pictures, same_size_batches
from vqfast.train.ranks import pick_device
from vqfast.train.runs import find_model

EPILOG = """\
Pictures are read, encoded and written a few at a time. One that cannot be read is skipped, counted and named."""


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a run's folder, a checkpoint file, or a folder from save_pretrained")
    parser.add_argument("pictures", help="a picture or a folder of pictures, any sizes")
    parser.add_argument("tokens", help="the token file to write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args) -> int:
    model, _, _ = find_model(Path(args.model))
    require_codes(model, args.model)
    model.to(pick_device(args.device))
    check_output_file(args.tokens)
    pictures, pixels = Pictures(args.pictures, model.config.in_channels), 0
    check_not_input(args.tokens, args.pictures)
    sizes = [quantizer.codebook_size for quantizer in model.quantizers]
    writer = TokenWriter(
        args.tokens, model=model_hash(model.state_dict()), codebook_sizes=sizes, info={"kind": "pictures"}
    )
    with exit_on_sigterm(), writer:
        for names, batch in same_size_batches(storable(pictures)):
            levels = [level.cpu().numpy() for level in encode_pictures(model, batch)[0]]
            for place, name in enumerate(names):
                writer.write(name, batch.shape[3], batch.shape[2], [level[place] for level in levels])
            pixels += len(names) * batch.shape[2] * batch.shape[3]
        for line in pictures.report():
            print(line)
        if not writer.records:
            raise UserError(
                f"none of the {len(pictures.skipped)} pictures in {args.pictures} can be read; there is no token file"
            )
    size = Path(args.tokens).stat().st_size
    skipped = f", {len(pictures.skipped)} skipped" if pictures.skipped else ""
    print(
        f"{args.tokens}: {writer.records} pictures{skipped}, {size:,} bytes, {8 * size / pixels:.3f} bits per pixel "
        f"({8 * writer.token_bytes / pixels:.3f} of them tokens)"
    )
    return 0


def check_not_input(out: str, pictures: str) -> None:
    """A picture that would be read must not be written over."""
    if Path(out).exists() and any(path.samefile(out) for path in find_pictures(pictures)):
        raise UserError(f"{out} is one of the pictures to read, so it is not overwritten; name another file")


def storable(pictures: Pictures) -> Iterator[tuple[str, Tensor]]:
    """The pictures whose names a file can hold, which are UTF-8; the others are skipped, counted and named."""
    for name, picture in pictures:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "backslashreplace").decode()
            pictures.skipped[pictures.root / name] = f"{shown} has a name that is not UTF-8; rename it to have it in the file"
            continue
        yield name, picture


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Lets a command that is asked to end remove the file it has begun."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def require_codes(model, name: str) -> None:
    """A VAE has no codes to write or read."""
    if not model.quantizers:
        raise UserError(f"{name} is a plain VAE; it has no codebook, so there are no tokens")

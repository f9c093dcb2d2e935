"""``vqfast encode``: pictures in, one token file out, however many pictures there are."""

from __future__ import annotations

from pathlib import Path

from vqfast.cli import UserError
from vqfast.cli._settings import Pictures
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
    if Path(args.tokens).is_dir():
        raise UserError(f"{args.tokens} is a folder; name the token file to write")
    pictures, pixels = Pictures(args.pictures, model.config.in_channels), 0
    sizes = [quantizer.codebook_size for quantizer in model.quantizers]
    with TokenWriter(
        args.tokens, model=model_hash(model.state_dict()), codebook_sizes=sizes, info={"kind": "pictures"}
    ) as writer:
        for names, batch in same_size_batches(pictures):
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


def require_codes(model, name: str) -> None:
    """A VAE has no codes to write or read."""
    if not model.quantizers:
        raise UserError(f"{name} is a plain VAE; it has no codebook, so there are no tokens")

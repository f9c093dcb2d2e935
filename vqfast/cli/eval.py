"""``vqfast eval``: how good a model is, next to JPEG and WebP at the same number of bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from vqfast._files import write_atomic
from vqfast.cli import UserError
from vqfast.cli._settings import Pictures
from vqfast.train.config import DataConfig
from vqfast.train.evaluate import Evaluation, evaluate
from vqfast.train.priors import find_priors
from vqfast.train.ranks import pick_device
from vqfast.train.runs import find_model
from vqfast.train.sources import SOURCES, open_sources


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a run's folder, a checkpoint file, or a folder from save_pretrained")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="photographs, cifar10, mnist (their test parts), or a picture or folder (whole pictures); "
        "default: the run's own test pictures",
    )
    parser.add_argument("--pictures", type=int, default=500, help="how many, evenly spread (default 500)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--no-codecs", action="store_true", help="leave out JPEG and WebP")
    parser.add_argument("--prior", metavar="FOLDER", help="count bytes as vqfast compress writes them with this prior")
    parser.add_argument("--fid", action="store_true", help="compute FID too; slow (needs: vqfast data metrics)")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON too")


def run(args) -> int:
    if args.pictures < 1:
        raise UserError(f"--pictures is {args.pictures}, but must be at least 1")
    model, config, source = find_model(Path(args.model))
    prior = find_priors(args.model, args.prior)[1] if args.prior else None
    model.to(pick_device(args.device))
    pictures, what, folder = _pictures(args, model, config)
    try:
        result = evaluate(model, pictures, codecs=not args.no_codecs, perceptual=True, fid=args.fid, prior=prior)
    except ValueError as error:  # no picture that can be read, or none that the model can take
        raise UserError(f"{what}: {error}") from None
    print(f"model      {source}\npictures   {result.pictures} of {what}")
    print("\n".join([*(folder.report() if folder else []), ""]))
    print("\n".join(table(result)))
    if args.json:
        write_atomic(args.json, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return 0


def _pictures(args, model, config):
    """The pictures to judge by, what they are, and the user's folder if they come from one."""
    channels = model.config.in_channels
    if args.data is not None and args.data not in SOURCES:
        source = Pictures(args.data, channels)
        source.spread(args.pictures)
        return (picture for _, picture in itertools.islice(source, args.pictures)), args.data, source
    if args.data is None and config is None:
        raise UserError(f"{args.model} does not say what it was trained on; name the pictures with --data")
    data = config.data if config is not None else DataConfig()
    if args.data is not None:
        data = dataclasses.replace(data, source=args.data, test="", folder="")
    sources = open_sources(data, channels)
    number = min(args.pictures, len(sources.test))
    return (sources.test[i * len(sources.test) // number] for i in range(number)), sources.test_name, None


def table(result: Evaluation) -> list[str]:
    """The figures as lines for people."""
    lines = [f"MSE                {result.mse:.6f}      PSNR {result.psnr:.2f} dB      SSIM {_or(result.ssim, '.4f')}"]
    seen = [
        ("LPIPS", result.lpips, ".4f", "AlexNet, 0: equal"),
        ("FID", result.fid, ".2f", "depends on how many pictures"),
    ]
    for name, value, form, remark in seen:
        if value is not None:
            lines += [f"{name:<18} {value:{form}}        {remark}"]
    if result.bits_per_dim is not None:
        lines += [f"bits/dim           {result.bits_per_dim:.3f}"]
    for level, (perplexity, usage) in enumerate(zip(result.perplexity, result.usage, strict=True)):
        name = f"level {level}" if len(result.perplexity) > 1 else "codes"
        lines += [f"{name:<18} perplexity {perplexity:.1f}, {usage:.1%} of the codebook used"]
    if result.token_bytes is not None:
        lines += [
            f"tokens             {result.bits_per_pixel:.3f} bits per pixel, {result.token_bytes:,.0f} bytes a picture"
        ]
    if result.codecs:
        lines += [
            "",
            "at the nearest equal size   bytes     PSNR     SSIM    LPIPS",
            f"  {'these tokens':<22} {result.token_bytes:>8,.0f} {_closeness(result)}",
        ]
        for codec in result.codecs:
            name, remark = f"{codec.name} quality {codec.quality}", "   (cannot go lower)" if codec.too_large else ""
            lines += [f"  {name:<22} {codec.bytes:>8,.0f} {_closeness(codec)}{remark}"]
    return lines + [f"note: {note}" for note in result.notes]


def _closeness(found) -> str:
    parts = [f"{'-' if value is None else format(value, '.4f'):>8}" for value in (found.ssim, found.lpips)]
    return f"{found.psnr:>8.2f} {' '.join(parts)}"


def _or(value: float | None, form: str) -> str:
    return "not computed" if value is None else format(value, form)

"""``vqfast train-prior``: priors over the codes of a trained model, one for every level."""

from __future__ import annotations

import textwrap
from pathlib import Path

from vqfast.cli import UserError
from vqfast.cli._settings import add_flags, key_lines, values_of
from vqfast.models import PRIOR_PRESETS
from vqfast.train.config import PRIORS, CodesConfig, merged
from vqfast.train.priors import FROM_CODES, begin_priors, prior_preset_values, resume_priors

# (flag, configuration key, type, help), beside those of vqfast train.
_FLAGS = (
    ("--kind", "model.kind", str, "network: " + ", ".join(PRIORS)),
    ("--channels", "model.channels", int, "width of the network"),
    ("--layers", "model.layers", int, "layers (snail: residual layers per block)"),
    ("--views", "codes.views", int, "random crops of each picture that are encoded; 0: the centre crop"),
    ("--limit", "codes.limit", int, "use at most so many pictures; 0: all"),
    ("--checkpoint-every", "train.checkpoint_every", int, "steps between two checkpoints"),
)


def _epilog() -> str:
    lines = ["The pictures are encoded once; then each level of codes gets its own prior, the coarsest first, each finer"]
    lines += ["one conditioned on the level above it. Starts from --preset small unless told otherwise.", "", "presets:"]
    for name, preset in PRIOR_PRESETS.items():
        lines += textwrap.wrap(f"  {name:<18} {preset.description}", 110, subsequent_indent=" " * 21)
    lines += ["", "keys beside those of vqfast train ([level-0], [level-1], ... hold what differs for one level, 0 the finest):"]
    lines += key_lines("codes", CodesConfig)
    for kind, (_, config) in PRIORS.items():
        lines += [f"  with model.kind = {kind}:", *key_lines("model", config, FROM_CODES)]
    return "\n".join(lines)


EPILOG = _epilog()


def add_arguments(parser) -> None:
    parser.add_argument("codes.model", nargs="?", metavar="MODEL", help="the model whose codes are to be modelled")
    parser.add_argument(
        "data.source",
        nargs="?",
        metavar="DATA",
        help="photographs, cifar10, mnist, or a folder of pictures (default: what the model was trained on)",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with [model], [codes], [data], [train]")
    add_flags(parser, without="data.source")
    for flag, key, kind, help in _FLAGS:
        parser.add_argument(flag, dest=key, type=kind, help=f"{help} [{key}]")
    parser.add_argument(
        "--labels", dest="codes.labels", action="store_true", default=None, help="condition on classes [codes.labels]"
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder for the priors (default: runs/prior)")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with the priors in RUN; without RUN: in --out"
    )


def run(args) -> int:
    folder = Path(args.resume or args.out or "runs/prior")
    if args.resume and args.out and Path(args.out) != folder:
        raise UserError(f"--resume {args.resume} goes on in that folder; leave out --out {args.out}")
    values = values_of(args, prior_preset_values)
    if args.resume or (args.resume == "" and (folder / "config.json").exists()):
        outcome = resume_priors(folder, values)
    else:
        base = {} if args.preset or args.config else prior_preset_values("small")
        if base and values.get("model", {}).get("kind", base["model"]["kind"]) != base["model"]["kind"]:
            del base["model"]  # its widths are those of another network
        outcome = begin_priors(merged(base, values), folder)
    if not outcome.interrupted:
        print(f"done. Next:\n  vqfast sample MODEL {folder} samples.png")
    return 0

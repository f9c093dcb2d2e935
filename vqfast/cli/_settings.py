"""Options that several commands share, and how they become a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vqfast.cli import UserError
from vqfast.train.config import assigned, merged, parse_assignment, preset_values, read_toml
from vqfast.train.sources import skipped_lines

# (flag, configuration key, type, help). Everything else goes through --set.
_FLAGS = (
    ("--data", "data.source", str, "photographs, cifar10, mnist, or a folder of pictures"),
    ("--size", "data.size", int, "side of the crops in pixels"),
    ("--batch-size", "data.batch_size", int, "pictures per step"),
    ("--steps", "train.steps", int, "optimizer steps in all"),
    ("--lr", "train.learning_rate", float, "learning rate"),
    ("--seed", "train.seed", int, "seed of everything random"),
    ("--device", "train.device", str, "auto, cpu, cuda or cuda:N"),
    ("--threads", "train.threads", int, "CPU threads"),
    ("--accumulate", "train.accumulate", int, "forward and backward rounds per optimizer step"),
)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that make up a configuration: TOML file, preset, common flags, --set."""
    parser.add_argument("config", nargs="?", help="TOML file with [model], [data], [train]")
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser, without: str = "") -> None:
    """The flags of `add_settings`; `without`: a key that has no flag here."""
    parser.add_argument("--preset", help="start from a preset (see the list below)")
    for flag, key, kind, help in _FLAGS:
        if key == without:
            continue
        parser.add_argument(
            flag, dest=key, type=kind, metavar=kind.__name__.upper().replace("STR", "TEXT"), help=f"{help} [{key}]"
        )
    parser.add_argument(
        "--bf16", dest="train.bf16", action="store_true", default=None, help="bfloat16 autocast [train.bf16]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key, like --set model.dim=32; repeatable"
    )


def values_of(args: argparse.Namespace, preset: Callable[[str], dict]) -> dict[str, Any]:
    """The nested values that the options ask for: preset, then TOML file, then flags, then --set."""
    flags = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    return merged(
        preset(args.preset) if args.preset else {},
        read_toml(args.config) if args.config else {},
        assigned(flags),
        assigned(dict(parse_assignment(text) for text in args.set)),
    )


def model_values_of(args: argparse.Namespace) -> dict[str, Any]:
    """`values_of` a model, whose preset must be of its kind: another would call the preset's settings unknown."""
    values = values_of(args, preset_values)
    if args.preset and isinstance(values["model"], dict):
        kind, asked = preset_values(args.preset)["model"]["kind"], values["model"]["kind"]
        if asked != kind:
            raise UserError(
                f"preset {args.preset} has settings for model.kind={kind}, model.kind={asked} is asked for; choose a preset of that kind,"
                " or leave --preset out"
            )
    return values


def settings_epilog() -> str:
    """The presets and all keys with their defaults, for --help."""
    from vqfast.models import PRESETS
    from vqfast.train.config import MODELS, SECTIONS

    lines = ["presets:"]
    for name, preset in PRESETS.items():
        lines += textwrap.wrap(f"  {name:<18} {preset.description}", 110, subsequent_indent=" " * 21)
    lines += ["", "keys and their defaults:"]
    for section, kind in SECTIONS.items():
        lines += key_lines(section, kind)
    lines += key_lines("model", MODELS["vqvae"][1])
    lines += [f"  {'model.kind':<24} {'vqvae':<14} {' or '.join(MODELS)}"]
    return "\n".join(lines)


def key_lines(section: str, kind: type, without: Sequence[str] = ()) -> list[str]:
    """The keys of a section that may be set, with their defaults and, where they say it, their meaning."""
    return [
        f"  {section + '.' + f.name:<24} {str(f.default):<14} {f.metadata.get('help', '')}".rstrip()
        for f in dataclasses.fields(kind)
        if f.name not in without
    ]


class Pictures:
    """Pictures from one file or a folder (any depth, any size), one at a time; those that cannot be read are skipped
    and counted.

    Args:
        path: a picture or a folder.
        channels: 1 or 3, what the model takes.

    Raises:
        UserError: no such path, or no pictures in it.
    """

    def __init__(self, path: str, channels: int):
        from vqfast.data import PictureFolder

        self.root = Path(path)
        if not self.root.exists():
            raise UserError(f"there is no {path}; give a picture or a folder of pictures")
        try:
            self._folder = PictureFolder(self.root, channels=channels)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from None
        self.skipped = self._folder.skipped

    def spread(self, count: int) -> None:
        """Lets `count` evenly spread ones come first; the others follow, to stand in for those that cannot be read."""
        paths = self._folder.paths
        count = min(count, len(paths))
        self._folder.paths = list(dict.fromkeys([*(paths[i * len(paths) // count] for i in range(count)), *paths]))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name relative to the folder, uint8 [C, H, W])."""
        for path, picture in self._folder.iterate():
            yield path.name if path == self.root else path.relative_to(self.root).as_posix(), picture

    def report(self) -> list[str]:
        """One line per skipped picture, the first few of them."""
        return skipped_lines(self.skipped)

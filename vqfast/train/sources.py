"""From a configuration to pictures: the training set, the set to judge by, and where each comes from in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vqfast.data import CIFAR10, MNIST, PictureFolder, default_folder, photographs
from vqfast.train.config import ConfigError, DataConfig, did_you_mean

SOURCES = ("photographs", "cifar10", "mnist")


class Sources(NamedTuple):
    """Data sets of uint8 pictures, and what the second one is, for people."""

    train: object
    test: object
    test_name: str


def open_sources(data: DataConfig, channels: int) -> Sources:
    """The data sets that [data] names.

    Raises:
        ConfigError: there is no such folder, it has no pictures, or a data set is not on this machine yet.
    """
    try:
        train, test, name = _open(data, channels)
        if data.test:
            test, name = PictureFolder(data.test, **_options(data, channels)), f"the pictures in {data.test}"
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return Sources(train, test, name)


def _open(data: DataConfig, channels: int) -> Sources:
    options = _options(data, channels)
    if data.source == "photographs":
        # Whole pictures to judge by: they are small, and people recognise them.
        return Sources(
            photographs("train", flip=data.flip, **options),
            photographs("test", channels=channels),
            "held-out embedded photographs",
        )
    if data.source in ("cifar10", "mnist"):
        folder = Path(data.folder) if data.folder else default_folder(data.source)
        if not folder.is_dir():
            raise ConfigError(
                f"{data.source} is not in {folder}; fetch it with: vqfast data {data.source}   "
                f"(or point to the official files with --set data.folder=FOLDER)"
            )
        if data.source == "cifar10":
            return Sources(
                CIFAR10(folder, True, flip=data.flip), CIFAR10(folder, False), "the 10,000 test pictures of CIFAR-10"
            )
        return Sources(MNIST(folder, True), MNIST(folder, False), "the 10,000 test pictures of MNIST")
    if not data.source:
        raise ConfigError("this preset trains on your own pictures: say where they are with --data FOLDER")
    if not Path(data.source).exists():
        hint = did_you_mean(data.source, SOURCES)
        raise ConfigError(
            f"there is no folder {data.source}{hint}; --data takes a folder of pictures, or one of {', '.join(SOURCES)}"
        )
    own = PictureFolder(data.source, flip=data.flip, **options)
    return Sources(
        own, PictureFolder(data.source, **options), "the training pictures themselves (no data.test was given)"
    )


def _options(data: DataConfig, channels: int) -> dict:
    return {"size": data.size, "resize": data.resize or None, "channels": channels}


def skipped_lines(skipped: Mapping[Path, str]) -> list[str]:
    """One line for each of the first few pictures that could not be read, and how many more there are."""
    lines = [f"skipped: {reason}" for reason in list(skipped.values())[:5]]
    return lines + ([f"... and {len(skipped) - 5} more"] if len(skipped) > 5 else [])

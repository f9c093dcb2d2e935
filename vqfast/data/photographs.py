"""The photographs that come with the package; photographs/SOURCES.md names author and licence of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .pictures import PictureFolder

FOLDER = Path(__file__).parent / "photographs"
# Pictures that training never sees.
HELD_OUT = ("launch-pad-coast.jpg", "rocket-hall.jpg")


def photographs(split: str = "train", **options: Any) -> PictureFolder:
    """The embedded public-domain photographs, 704x352 pixels each.

    Args:
        split: "train" (14 pictures), "test" (2 held-out ones) or "all".
        **options: of `PictureFolder`.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}, it must be 'train', 'test' or 'all'")
    pictures = PictureFolder(FOLDER, **options)
    if split != "all":
        pictures.paths = [path for path in pictures.paths if (path.name in HELD_OUT) == (split == "test")]
    return pictures

"""Pictures in files: reading one safely, writing one, and folders of them as a data set."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .._files import atomic_file
from ..models.pixels import float_to_pixels
from .draws import Draws

SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm".split())
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
# Pillow's own threshold: a picture that unpacks to a quarter of a gigabyte is an accident or an attack.
MAX_PIXELS = 89_478_485


class PictureError(ValueError):
    """A file is not a picture that can be read; the message names the file and the reason."""


def open_picture(
    path: str | os.PathLike,
    *,
    channels: int = 3,
    least: int = 0,
    resize: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Reads one picture: upright by its EXIF tag, transparency laid on white, an animation's first frame.

    Args:
        path: a file that Pillow reads.
        channels: 3 (RGB) or 1 (grey).
        least: smaller pictures are enlarged until their shorter side has this many pixels.
        resize: scales the shorter side to this many pixels; 0 leaves the size.
        max_pixels: pictures that are larger, or would be once enlarged, are refused before they are unpacked.

    Returns:
        uint8 [channels, H, W].

    Raises:
        PictureError: missing, not a regular file, truncated, damaged, too large, or no picture at all.
    """
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")  # a name that is not UTF-8 cannot be printed
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PictureError(f"{shown} is not a regular file")
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise PictureError(f"{shown} has {width}x{height} pixels, more than the limit of {max_pixels}")
            columns, rows = _scaled_size(image.size, least, resize)
            if columns * rows > max_pixels:
                raise PictureError(
                    f"{shown} has {width}x{height} pixels, and {columns}x{rows} once its shorter side is enlarged: more "
                    f"than the limit of {max_pixels}"
                )
            if resize:
                # A JPEG is decoded at a fraction of its size where that is still large enough.
                image.draft(None, (max(least, resize), max(least, resize)))
            image = _upright(image, channels)
            size = _scaled_size(image.size, least, resize)
            return _to_tensor(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))
    except PictureError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Decoders of damaged files raise anything from EOFError to struct.error.
        raise PictureError(f"{shown} cannot be read as a picture: {error or type(error).__name__}") from None


def _upright(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow would clip it at 255.
        image = Image.fromarray(
            (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        )
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _scaled_size(size: tuple[int, int], least: int, resize: int) -> tuple[int, int]:
    shorter = min(size)
    target = max(least, resize or shorter)
    return size if target == shorter else tuple(max(target, round(side * target / shorter)) for side in size)


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def save_picture(path: str | os.PathLike, picture: Tensor, **options: int) -> None:
    """Writes one picture; the file appears whole or not at all.

    Args:
        path: the suffix names the format: .png, .jpg, .jpeg or .webp.
        picture: [C, H, W] with C = 1 or 3, uint8 or float in [-0.5, 0.5].
        **options: of Pillow's writer, such as quality=90.

    Raises:
        ValueError: another suffix or shape.
    """
    path = Path(path)
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path} does not say which format to write; end it with {', '.join(FORMATS)}")
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture has shape {tuple(picture.shape)}, expected [1 or 3, H, W]")
    pixels = picture if picture.dtype == torch.uint8 else float_to_pixels(picture)
    array = pixels.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    with atomic_file(path) as file:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, form, **options)


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """All picture files under a folder, sorted by path. Links are followed; a loop of links is entered once.

    Args:
        folder: a folder, or one picture file.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no picture is in it; the message says which endings count.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for top, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that of several links to one folder the same is entered on every machine.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(top, n) for n in files if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(
            f"there is no picture in {folder}; files that end with {' '.join(sorted(SUFFIXES))} count"
        )
    return sorted(found)


class PictureFolder:
    """A folder of pictures of any sizes as a data set; sub-folders included.

    A picture that cannot be read is skipped: the next readable one takes its place, and `skipped` says which
    and why.

    Args:
        folder: a folder or a single picture file.
        size: side of the square crops, in pixels (smaller pictures are enlarged); None: whole pictures.
        resize: shorter side to which pictures are scaled before they are cropped; None: as they are.
        flip: mirror half of the samples horizontally.
        channels: 3 or 1.
        cache_mib: memory for decoded pictures, MiB; the oldest go first.
        max_pixels: larger pictures are skipped.

    Attributes:
        paths: the files, sorted.
        skipped: path -> reason, filled while reading.

    Raises:
        FileNotFoundError, ValueError: as `find_pictures`; or a setting that is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        size: int | None = None,
        resize: int | None = None,
        flip: bool = False,
        channels: int = 3,
        cache_mib: int = 256,
        max_pixels: int = MAX_PIXELS,
    ):
        for name, value in (("size", size), ("resize", resize)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1 pixel, or None")
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}, it must be 1 (grey) or 3 (RGB)")
        self.folder, self.paths = Path(folder), find_pictures(folder)
        self.size, self.resize, self.flip, self.channels = size, resize, flip, channels
        self.max_pixels = max_pixels
        self.skipped: dict[Path, str] = {}
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._room = cache_mib << 20
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Picture `index`, uint8 [C, H, W]: its centre crop, or the whole picture when size is None."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} pictures, index {index} is outside")
        picture = self._readable(index % len(self)).clone()  # The cache keeps its own.
        if self.size is None:
            return picture
        top, left = ((side - self.size) // 2 for side in picture.shape[1:])
        return picture[:, top : top + self.size, left : left + self.size]

    def sample(self, index: int, draws: Draws) -> Tensor:
        """A random crop of picture `index`, flipped or not: uint8 [C, size, size]."""
        if self.size is None:
            raise ValueError("random crops need a size: PictureFolder(folder, size=64)")
        picture = self._readable(index)
        top, left = (draws.integer(side - self.size + 1) for side in picture.shape[1:])
        crop = picture[:, top : top + self.size, left : left + self.size]
        return crop.flip(-1) if self.flip and draws.integer(2) else crop

    def iterate(self) -> Iterator[tuple[Path, Tensor]]:
        """Every readable picture once, whole, in order, one at a time; the others go to `skipped`."""
        for path in self.paths:
            try:
                picture = self._open(path, least=0)
            except PictureError as error:
                self.skipped[path] = str(error)
                continue
            yield path, picture

    def _open(self, path: Path, least: int) -> Tensor:
        return open_picture(
            path, channels=self.channels, least=least, resize=self.resize or 0, max_pixels=self.max_pixels
        )

    def _readable(self, index: int) -> Tensor:
        """Picture `index`, or the first readable one after it; which one depends on the files alone."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            path = self.paths[place]
            if path in self.skipped:
                continue
            try:
                return self._cached(place)
            except PictureError as error:
                self.skipped[path] = str(error)
        raise ValueError(
            f"none of the {len(self)} pictures in {self.folder} can be read: {self.skipped[self.paths[0]]}"
        )

    def _cached(self, place: int) -> Tensor:
        with self._lock:
            if place in self._cache:
                self._cache.move_to_end(place)
                return self._cache[place]
        picture = self._open(self.paths[place], least=self.size or 0)
        with self._lock:
            if place not in self._cache and picture.numel() <= self._room:
                self._cache[place] = picture
                self._room -= picture.numel()
            while self._room < 0:
                self._room += self._cache.popitem(last=False)[1].numel()
        return picture

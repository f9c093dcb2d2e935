"""Files that are either the old one or the whole new one, never half of one; and the hash that tells tensors apart."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Opens a new file for writing that takes the name ``path`` only when it is complete and on disk.

    The bytes go to a temporary name in the same folder, are synced, and renamed over ``path``. When the block raises,
    the temporary file is removed and whatever was at ``path`` before is untouched.

    Args:
        path: the final name; its folder is created. A link stays and its target is written.

    Raises:
        OSError: there is something other than a file, the folder cannot be written, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    _refuse_other_kinds(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name does not contain the final one, which may already be as long as the file system allows.
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    _sync_folder(path.parent)


def check_output_file(path: str | os.PathLike) -> None:
    """Refuses a file that could not be written, before the work that would be lost with it.

    Raises:
        OSError: there is something other than a file, or its place cannot be written.
    """
    path = Path(os.path.realpath(path))
    _refuse_other_kinds(path)
    _check_place(path.parent)


def check_output_folder(path: str | os.PathLike) -> None:
    """The same for a folder of new files, which need not exist yet."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; name a folder", str(path))
    _check_place(path)


def _refuse_other_kinds(path: Path) -> None:
    """A rename would put a file where a device or a pipe was."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file to write", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no regular file, so it is not overwritten; name a file to write", str(path))


def _check_place(folder: Path) -> None:
    """What exists of ``folder`` must be a folder in which this process may make files."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, so nothing can be written inside it", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written; name another place or change its permissions", str(folder))


def remove_strays(folder: str | os.PathLike) -> None:
    """Deletes the temporary files that killed writers of :func:`atomic_file` left directly in a folder."""
    for stray in Path(folder).glob(".*.part"):
        stray.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes ``content`` (text as UTF-8) to ``path`` through :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def _umask() -> int:
    """The process' umask; mkstemp makes files that only their owner can read, ordinary files follow the umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable. Some systems cannot open a folder; then the file is still whole, only maybe
    old.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def hash_tensors(tensors, start: bytes = b"") -> str:
    """sha256 over ``start`` and every tensor's name, dtype, shape and bytes, in sorted order of names."""
    import torch

    digest = hashlib.sha256(start)
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

"""Files that are either the old one or the whole new one, never half of one; and the hash that tells tensors apart."""

from __future__ import annotations

import contextlib
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
        path: the final name; its folder is created.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


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

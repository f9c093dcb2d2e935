"""Rows of vectors in files, as sources for `vqfast.kmeans`: nothing is in memory that was not asked for."""

from __future__ import annotations

import os
import tokenize
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqfast.ops.gather import gather
from vqfast.tokens import TokenReader

from .arrays import DataFileError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def open_latents(path: str | os.PathLike, name: str | None = None) -> Tensor:
    """The rows [N, D] of a .npy or .safetensors file, mapped into memory: the system reads what is used, and may drop it again.

    Args:
        path: the file; its array has two axes or more, the last one D, of float16, bfloat16 (safetensors), float32 or float64.
        name: of the tensor in a safetensors file that holds more than one.

    Returns:
        A tensor that shares memory with the file's mapping. Writing into it does not change the file.

    Raises:
        FileNotFoundError: there is no such file. DataFileError: another format, damaged, or not rows of floats.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    readers = {".npy": _open_npy, ".safetensors": _open_safetensors}
    if path.suffix not in readers:
        raise DataFileError(f"{path} is neither .npy nor .safetensors")
    values = readers[path.suffix](path, name)
    if values.ndim < 2 or not values.shape[-1] or values.dtype not in _DTYPES:
        raise DataFileError(
            f"{path} holds {list(values.shape)} {values.dtype}; rows [..., D] of 16, 32 or 64 bit floats are needed"
        )
    return values.reshape(-1, values.shape[-1])


def _open_npy(path: Path, name: str | None) -> Tensor:
    if name is not None:
        raise DataFileError(f"{path} holds a single array, so there is no {name!r} in it")
    try:
        # Copy on write: PyTorch knows no tensors that cannot be written.
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    # NumPy parses the header as Python, and lets what its parser raises through.
    except (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, OverflowError) as error:
        raise DataFileError(f"{path} cannot be read as rows of floats: {error}") from error


def _open_safetensors(path: Path, name: str | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if name is None and len(names) != 1:
                raise DataFileError(f"{path} holds {len(names)} tensors ({', '.join(names[:5])}); say which by name")
            if name is not None and name not in names:
                raise DataFileError(f"{path} holds no {name!r}, only {', '.join(names[:5])}")
            return file.get_tensor(name or names[0])
    except SafetensorError as error:
        raise DataFileError(f"{path} is no whole safetensors file: {error}") from error


class TokenLatents:
    """The vectors [N, D] that one level of a token file stands for: codebook[indices], made a piece at a time when asked for.

    Only the indices are in memory, 4 bytes each.

    Args:
        path: a token file, as `vqfast encode` writes it.
        codebook: [K, D] of the level; K must be the file's.
        level: of the file.
        model: `vqfast.tokens.model_hash` of the model whose codebook this is; None does not compare.

    Raises:
        TokenFileError: the file is damaged, or of another model. ValueError: level or codebook do not fit.
    """

    def __init__(self, path: str | os.PathLike, codebook: Tensor, level: int = 0, *, model: str | None = None):
        with TokenReader(path) as reader:
            if model is not None:
                reader.require_model(model)
            sizes = reader.codebook_sizes
            if not 0 <= level < len(sizes):
                raise ValueError(f"{path} has {len(sizes)} levels, there is no level {level}")
            if codebook.ndim != 2 or len(codebook) != sizes[level]:
                raise ValueError(f"codebook is {list(codebook.shape)}, level {level} of {path} has {sizes[level]} codes")
            found = [torch.from_numpy(record.levels[level].reshape(-1).astype(np.int32)) for record in reader]
        self.indices = torch.cat(found) if found else torch.empty(0, dtype=torch.int32)
        self.codebook = codebook
        self.shape = (len(self.indices), codebook.shape[1])
        self.dtype = codebook.dtype

    def __getitem__(self, at: slice | Tensor) -> Tensor:
        """Rows [n, D] of a slice or of int64 positions [n]."""
        return gather(self.codebook, self.indices[at])

"""Token files: the codes of many pictures (or sounds, or clips) of one model, in a file that cannot be misread.

Layout, all numbers little-endian, all checksums CRC-32::

    start    8 bytes 89 'VQT' 0D 0A 1A 0A | u16 version | u32 length | header: JSON of that length | u32 checksum of
    all this record   u8 1 | u32 length | body of that length | u32 checksum of tag, length and body
    ...
    end      u8 0 | u64 number of records | u32 checksum of all record checksums, in order

    header   {"model": sha256 of the model, "codebook_sizes": [K of each level], ...free keys}
    body     u16 length | name, UTF-8 | u32 width | u32 height | for each level: u8 axes, u32 * axes, packed indices

An index takes ``bits_for(K)`` bits, lowest bit first, filling bytes from the lowest bit; each level starts a new
byte. Records are written and read one at a time, so a file may be larger than memory. A file that was cut has no end
mark; an altered byte fails a checksum; an index outside its codebook is refused even when the checksum is right.
"""

from __future__ import annotations

import json
import math
import operator
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqfast._files import atomic_file, hash_tensors

MAGIC = b"\x89VQT\r\n\x1a\n"
VERSION = 1
_HEADER_LIMIT = 1 << 20  # bytes; a header is a few hundred, so more is damage or an attack
_RECORD_LIMIT = 1 << 31
_AXES_LIMIT = 8
_RECORD, _END = 1, 0


class TokenFileError(ValueError):
    """A token file is cut, altered, of another kind, or belongs to another model."""


class TokenRecord(NamedTuple):
    """The codes of one picture: its name, its size in pixels, and one int64 array per level."""

    name: str
    width: int
    height: int
    levels: tuple[np.ndarray, ...]


def bits_for(codebook_size: int) -> int:
    """Bits that an index into ``codebook_size`` codes takes in a token file: ceil(log2 K), at least 1."""
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    return max(1, (codebook_size - 1).bit_length())


def pack_indices(indices: np.ndarray, bits: int) -> bytes:
    """Packs integers in [0, 2**bits) to ``bits`` bits each, lowest bit first."""
    flat = np.ascontiguousarray(indices).reshape(-1).astype("<u8")
    planes = np.unpackbits(flat.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")[:, :bits]
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack_indices(packed: bytes, count: int, bits: int) -> np.ndarray:
    """The ``count`` integers (int64) that :func:`pack_indices` packed to ``bits`` bits each."""
    stream = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * bits, bitorder="little")
    planes = np.zeros((count, 64), np.uint8)
    planes[:, :bits] = stream.reshape(count, bits)
    return np.packbits(planes, axis=1, bitorder="little").view("<i8").reshape(-1).astype(np.int64)


def packed_bytes(shape: Sequence[int], codebook_size: int) -> int:
    """Bytes that one level of this shape takes in a token file."""
    return (
        math.prod(map(int, shape)) * bits_for(codebook_size) + 7
    ) // 8  # Python integers: a forged shape cannot overflow


def model_hash(state: Mapping[str, Any]) -> str:
    """The sha256 that ties tokens to a model: over names, dtypes, shapes and bytes of its state_dict, in sorted
    order.
    """
    return hash_tensors(state)


class TokenWriter:
    """Writes a token file record by record; the file takes its name only when ``with`` ends without an error.

    Args:
        path: the file to make.
        model: :func:`model_hash` of the model whose codes these are.
        codebook_sizes: K of each level, in the order in which :meth:`write` gets the levels.
        info: more JSON keys for the header (for people; readers ignore them).

    Raises:
        TypeError, ValueError: a header that no reader would take.
    """

    def __init__(
        self, path: str | os.PathLike, *, model: str, codebook_sizes: Sequence[int], info: Mapping | None = None
    ):
        sizes = [int(operator.index(size)) for size in codebook_sizes]
        header = {**(info or {}), "model": model, "codebook_sizes": sizes}
        if _checked_header(header) is None:
            raise ValueError(
                f"model is {model!r:.80} and codebook_sizes {sizes!r:.80}; a token file needs the string that model_hash "
                "gives, and the size of each level, from 1 to 2**48 - 1"
            )
        self.codebook_sizes, self._bits = tuple(sizes), [bits_for(size) for size in sizes]
        self._start = json.dumps(header, sort_keys=True).encode()
        if len(self._start) > _HEADER_LIMIT:
            raise ValueError(f"the header takes {len(self._start):,} bytes, at most {_HEADER_LIMIT:,} fit; shorten info")
        self._open = atomic_file(path)
        self.records, self.token_bytes, self._chain = 0, 0, 0

    def __enter__(self) -> TokenWriter:
        self._file = self._open.__enter__()
        start = MAGIC + struct.pack("<HI", VERSION, len(self._start)) + self._start
        self._file.write(start + struct.pack("<I", zlib.crc32(start)))
        return self

    def write(self, name: str, width: int, height: int, levels: Sequence[np.ndarray]) -> None:
        """Appends one picture.

        Raises:
            ValueError: wrong number of levels, an index outside its codebook, a name that is too long or not UTF-8,
            a size that does not fit 32 bits. TypeError: indices or sizes that are no integers.
        """
        if len(levels) != len(self.codebook_sizes):
            raise ValueError(f"{name}: got {len(levels)} levels, the file holds {len(self.codebook_sizes)} per picture")
        try:
            encoded = name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the name {name!r} is not UTF-8, as names in a token file are; rename the picture") from None
        if len(encoded) > 0xFFFF:
            raise ValueError(f"a name of {len(encoded)} bytes is longer than the 65,535 that a token file can hold")
        width, height = operator.index(width), operator.index(height)
        if not (0 <= width < 2**32 and 0 <= height < 2**32):
            raise ValueError(f"{name}: a size of {width}x{height} does not fit; each side must be from 0 to 2**32 - 1")
        parts, token_bytes = [struct.pack("<H", len(encoded)), encoded, struct.pack("<II", width, height)], 0
        for level, (size, bits) in enumerate(zip(self.codebook_sizes, self._bits, strict=True)):
            indices = np.asarray(levels[level])
            if indices.size == 0 or indices.ndim > _AXES_LIMIT:
                raise ValueError(
                    f"{name}: level {level} has shape {indices.shape}; it needs 1 or more codes and "
                    f"{_AXES_LIMIT} axes at most"
                )
            if indices.dtype.kind not in "iu":
                raise TypeError(f"{name}: level {level} is {indices.dtype}; codes are integers")
            if not (0 <= int(indices.min()) and int(indices.max()) < size):
                raise ValueError(
                    f"{name}: level {level} has indices from {indices.min()} to {indices.max()}, outside its "
                    f"codebook of {size} codes"
                )
            packed = pack_indices(indices, bits)
            parts += [struct.pack(f"<B{indices.ndim}I", indices.ndim, *indices.shape), packed]
            token_bytes += len(packed)
        body = b"".join(parts)
        if len(body) > _RECORD_LIMIT:
            raise ValueError(f"{name}: its codes take {len(body):,} bytes, at most {_RECORD_LIMIT:,} fit in a record")
        record = struct.pack("<BI", _RECORD, len(body)) + body
        checksum = struct.pack("<I", zlib.crc32(record))
        self._file.write(record + checksum)
        self._chain = zlib.crc32(checksum, self._chain)
        self.records += 1
        self.token_bytes += token_bytes

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._file.write(struct.pack("<BQI", _END, self.records, self._chain))
        self._open.__exit__(kind, error, trace)


class TokenReader:
    """Reads a token file, one checked record at a time.

    Iterating yields :class:`TokenRecord`, each time from the first one on; one loop at a time. ``header``, ``model`` and
    ``codebook_sizes`` are there at once.

    Raises:
        TokenFileError: at construction when the start is damaged or no token file; while iterating at the first
        damaged record, so
            everything that was yielded before is right.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = open(self.path, "rb")
        try:
            self._left = os.fstat(self._file.fileno()).st_size
            self.header = self._read_header()
            if (checked := _checked_header(self.header)) is None:
                self._fail("the header lacks the model's hash or the codebook sizes")
            self.model, self.codebook_sizes = checked
            self._begin, self._after_begin = self._file.tell(), self._left
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TokenReader:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def require_model(self, model: str) -> None:
        """Refuses to go on with a model other than the one that made these tokens."""
        if model != self.model:
            raise TokenFileError(
                f"{self.path}: these tokens were made by another model (the file names {self.model[:12]}, this model "
                f"is {model[:12]}); decode them with the model that encoded them"
            )

    def __iter__(self) -> Iterator[TokenRecord]:
        chain = count = 0
        self._file.seek(self._begin)
        self._left = self._after_begin
        while True:
            tag = self._take(1)
            if tag[0] == _END:
                break
            if tag[0] != _RECORD:
                self._fail(f"record {count} starts with the unknown tag {tag[0]}: the file was altered")
            start = tag + self._take(4)
            length = struct.unpack("<I", start[1:])[0]
            if length > _RECORD_LIMIT:
                self._fail(f"record {count} claims {length} bytes: the file was altered")
            body = self._take(length)
            checksum = self._take(4)
            if zlib.crc32(body, zlib.crc32(start)) != struct.unpack("<I", checksum)[0]:
                self._fail(f"record {count} does not match its checksum: the file was altered")
            chain = zlib.crc32(checksum, chain)
            yield self._parse(body, count)
            count += 1
        records, total = struct.unpack("<QI", self._take(12))
        if (records, total) != (count, chain):
            self._fail(f"the end mark does not fit the {count} records before it: records were removed, added or moved")
        if self._left:
            self._fail(f"{self._left} bytes follow the end mark: the file was altered")

    def _parse(self, body: bytes, number: int) -> TokenRecord:
        """One record from a body whose checksum is right; a wrong shape or index is still refused."""
        try:
            (length,) = struct.unpack_from("<H", body)
            name = body[2 : 2 + length].decode("utf-8")
            width, height = struct.unpack_from("<II", body, 2 + length)
            at, levels = 10 + length, []
            for level, size in enumerate(self.codebook_sizes):
                axes = body[at]
                shape = struct.unpack_from(f"<{axes}I", body, at + 1)
                at += 1 + 4 * axes
                need = packed_bytes(shape, size)
                if need == 0 or axes > _AXES_LIMIT or at + need > len(body):
                    self._fail(f"record {number} does not hold what its shape {shape} asks for: the file was altered")
                indices = unpack_indices(body[at : at + need], math.prod(shape), bits_for(size))
                if int(indices.max()) >= size:
                    self._fail(
                        f"record {number} ({name}): level {level} has index {indices.max()}, outside its codebook of "
                        f"{size} codes"
                    )
                levels.append(indices.reshape(shape))
                at += need
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            self._fail(f"record {number} cannot be read ({error}): the file was altered")
        if at != len(body):
            self._fail(f"record {number} is longer than its shapes ask for: the file was altered")
        return TokenRecord(name, width, height, tuple(levels))

    def _read_header(self) -> dict:
        if self._left < len(MAGIC) or (magic := self._take(len(MAGIC))) != MAGIC:
            self._fail("this is no vqfast token file (it does not start with the right bytes)")
        start = self._take(6)
        version, length = struct.unpack("<HI", start)
        if version != VERSION:
            self._fail(f"this is version {version} of the token format, this vqfast reads version {VERSION}")
        if length > _HEADER_LIMIT:
            self._fail(f"the header claims {length} bytes: the file was altered")
        text = self._take(length)
        if zlib.crc32(magic + start + text) != struct.unpack("<I", self._take(4))[0]:
            self._fail("the header does not match its checksum: the file was altered")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self._fail("the header is no JSON")

    def _take(self, length: int) -> bytes:
        """The next bytes; never asks for more memory than the file has bytes."""
        if length > self._left:
            self._fail("the file ends too early: it was cut, or its writing never finished")
        self._left -= length
        return self._file.read(length)

    def _fail(self, reason: str):
        raise TokenFileError(f"{self.path}: {reason}")


def _checked_header(header: Any) -> tuple[str, tuple[int, ...]] | None:
    """Model hash and codebook sizes of a header; None unless they have the right types and ranges."""
    model, sizes = (header.get("model"), header.get("codebook_sizes")) if isinstance(header, dict) else (None, None)
    whole = isinstance(sizes, list) and sizes and all(type(size) is int and 1 <= size < 2**48 for size in sizes)
    return (model, tuple(sizes)) if isinstance(model, str) and whole else None

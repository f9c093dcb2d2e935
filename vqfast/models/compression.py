"""Lossless compression of codes with a prior's own probabilities, and the file that holds them.

Coder and decoder use the sampler's canonical arithmetic, whose bits are the same on every machine, so what one
machine writes
another can read. The entropy coder is constriction's range coder.

File, all numbers little-endian:

    8 bytes 89 'VQE' 0D 0A 1A 0A | u16 version | u32 length | JSON header | u32 CRC-32 of all this
    per picture   u16 length | name, UTF-8 | u32 width | u32 height | i32 label | per level: u32 rows, u32
    columns, u32 length, bytes
                  | u32 CRC-32 of the picture
    header        {"model": sha256, "prior": sha256 of every level's program, "coder", "arithmetic",
    "codebook_sizes", "pictures"}
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import reference_sample
from vqfast._files import write_atomic

from .priors import CodePrior, HierarchicalPrior
from .sampling import Stepper, canonical_logits, compile_prior

MAGIC = b"\x89VQE\r\n\x1a\n"
VERSION = 1
ARITHMETIC = "vqfast-canonical-1"  # a new name whenever the canonical arithmetic gives other bits
CODER = "constriction-range-categorical-1"
_HEADER_LIMIT = 1 << 20
_PIXELS_LIMIT = 89_478_485  # no larger picture is read, so a file that names one was forged


class CompressedFileError(ValueError):
    """A compressed file is cut, altered, of another version, or belongs to another model or prior."""


class CompressedPicture(NamedTuple):
    """One picture of a file: size in pixels, label (-1: none) and the coded levels, finest first, as (rows,
    columns, bytes)."""

    name: str
    width: int
    height: int
    label: int
    levels: list[tuple[int, int, bytes]]


# ---- codes <-> bytes ---------------------------------------------------------------------------------------


def compress_codes(
    prior: CodePrior, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
) -> list[bytes]:
    """Entropy-code maps of codes; about - log2 p(codes) bits each, plus at most 4 bytes and 2^-24-sized rounding of p.

    **Shapes**: codes [B, H, W] int64, labels and condition as the prior's forward.

    Returns:
        One byte string per map.

    Raises:
        ImportError: constriction is not installed. ValueError, IndexError: the codes do not fit the prior.
    """
    constriction = _constriction()
    logits, _ = canonical_logits(prior, codes, labels, condition)
    if prior.config.codebook_size == 1:  # the only code there is costs nothing, and the entropy coder needs two
        return [b""] * len(codes)
    model = constriction.stream.model.Categorical(perfect=False)
    streams = []
    for b in range(codes.shape[0]):
        encoder = constriction.stream.queue.RangeEncoder()
        symbols = codes[b].flatten().to(torch.int32).cpu().numpy()
        encoder.encode(symbols, model, probabilities(logits[b].flatten(0, 1)).cpu().numpy())
        streams.append(encoder.get_compressed().astype("<u4").tobytes())
    return streams


def decompress_codes(
    prior: CodePrior,
    streams: Sequence[bytes],
    height: int,
    width: int,
    labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The inverse of `compress_codes`: [len(streams), height, width] int64. Labels and condition must be the
    coder's."""
    import numpy as np

    constriction = _constriction()
    stepper = Stepper(prior, len(streams), height, width, labels, condition)
    if prior.config.codebook_size == 1:
        if any(streams):
            raise CompressedFileError("a level with a single code has coded bytes, but needs none: the file was altered")
        return torch.zeros_like(stepper.tokens)
    model = constriction.stream.model.Categorical(perfect=False)
    decoders = []
    for stream in streams:
        if len(stream) % 4:
            raise CompressedFileError(
                f"a coded level has {len(stream)} bytes; the coder writes whole words of 4: it was cut"
            )
        decoders.append(constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32)))
    for position, logits in stepper:
        table = probabilities(logits).cpu().numpy()
        try:
            codes = [int(decoder.decode(model, table[b : b + 1])[0]) for b, decoder in enumerate(decoders)]
        except (AssertionError, ValueError) as error:
            raise CompressedFileError(
                f"the coded bytes at position {position} fit no code ({error}): another prior wrote them"
            ) from None
        stepper.put(position, torch.tensor(codes))
    return stepper.tokens


def probabilities(logits: Tensor) -> Tensor:
    """softmax in float64 with a fixed order of operations: the same bits everywhere. [N, K] -> [N, K]."""
    z = logits.double()
    e = reference_sample.exp64(z - z.max(dim=1, keepdim=True).values)
    # Codes one after the other: a fixed order, unlike sum().
    total = e.new_zeros(len(e))
    for column in e.T.contiguous():
        total = total + column
    return e / total[:, None]


def compress_levels(
    prior: CodePrior | HierarchicalPrior, levels: Sequence[Tensor], labels: Tensor | None = None
) -> list[list[bytes]]:
    """Code all levels of some pictures, finest first -> for each picture its levels' byte strings."""
    priors = _levels(prior, len(levels))
    columns = [
        compress_codes(p, codes, _known(p, labels, len(codes)), above)
        for p, codes, above in zip(priors, levels, [*levels[1:], None])
    ]
    return [list(row) for row in zip(*columns)]


def stored_bytes(coded: Sequence[bytes]) -> int:
    """Bytes that a picture takes in a file (`write_compressed`), without its name; `coded` as `compress_levels` gives."""
    return struct.calcsize("<HIIi") + sum(struct.calcsize("<III") + len(stream) for stream in coded) + 4


def decompress_levels(
    prior: CodePrior | HierarchicalPrior,
    pictures: Sequence[Sequence[tuple[int, int, bytes]]],
    labels: Tensor | None = None,
) -> list[Tensor]:
    """The inverse: pictures of one size, each with (rows, columns, bytes) per level, finest first -> codes per
    level."""
    priors = _levels(prior, len(pictures[0]))
    found: list[Tensor] = []
    for depth in reversed(range(len(priors))):
        rows, columns, _ = pictures[0][depth]
        streams = [picture[depth][2] for picture in pictures]
        known = _known(priors[depth], labels, len(pictures))
        found.insert(0, decompress_codes(priors[depth], streams, rows, columns, known, found[0] if found else None))
    return found


def _levels(prior: CodePrior | HierarchicalPrior, count: int) -> list[CodePrior]:
    priors = list(prior.priors) if isinstance(prior, HierarchicalPrior) else [prior]
    if len(priors) != count:
        raise ValueError(f"the codes have {count} levels, the prior has {len(priors)}; they must belong together.")
    return priors


def _known(prior: CodePrior, labels: Tensor | None, count: int) -> Tensor | None:
    if not prior.config.classes:
        return None
    return torch.full((count,), -1) if labels is None else labels


def _constriction():
    try:
        import constriction
    except ImportError:
        raise ImportError("compression needs the entropy coder constriction: pip install constriction") from None
    return constriction


# ---- the file ----------------------------------------------------------------------------------------------


def prior_digest(prior: CodePrior | HierarchicalPrior) -> str:
    """sha256 over the programs of all levels, finest first, and their condition stacks."""
    digest = hashlib.sha256()
    for level in prior.priors if isinstance(prior, HierarchicalPrior) else [prior]:
        digest.update(compile_prior(level).digest().encode())
        if level.condition_stack is not None:
            for tensor in level.condition_stack.state_dict().values():
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_compressed(
    path: str | os.PathLike, pictures: Sequence[CompressedPicture], *, model: str, prior: CodePrior | HierarchicalPrior
) -> int:
    """Write a compressed file whole or not at all; returns its size in bytes. `model` is vqfast.tokens.model_hash
    of the autoencoder."""
    priors = list(prior.priors) if isinstance(prior, HierarchicalPrior) else [prior]
    header = {
        "model": model, "prior": prior_digest(prior), "coder": CODER, "arithmetic": ARITHMETIC,
        "codebook_sizes": [p.config.codebook_size for p in priors], "pictures": len(pictures),
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True).encode()
    start = MAGIC + struct.pack("<HI", VERSION, len(text)) + text
    content = bytearray(start + struct.pack("<I", zlib.crc32(start)))
    for picture in pictures:
        name = picture.name.encode("utf-8")
        body = struct.pack("<H", len(name)) + name + struct.pack("<IIi", picture.width, picture.height, picture.label)
        for rows, columns, coded in picture.levels:
            body += struct.pack("<III", rows, columns, len(coded)) + coded
        content += body + struct.pack("<I", zlib.crc32(body))
    write_atomic(path, bytes(content))
    return len(content)


def read_compressed(
    path: str | os.PathLike, *, model: str, prior: CodePrior | HierarchicalPrior
) -> list[CompressedPicture]:
    """Read a compressed file that this model and prior wrote.

    Raises:
        CompressedFileError: cut, altered, of another version or arithmetic, or of another model or prior.
    """
    with open(path, "rb") as file:
        content = file.read()
    reader = _Reader(content, str(path))
    header = reader.header()
    mine = {"model": model, "prior": prior_digest(prior), "coder": CODER, "arithmetic": ARITHMETIC}
    for key, value in mine.items():
        if header.get(key) != value:
            raise CompressedFileError(
                f"{path} was written with {key} {header.get(key)!r}, this is {value!r}; decompress it with the same one."
            )
    priors = list(prior.priors) if isinstance(prior, HierarchicalPrior) else [prior]
    count = header.get("pictures")
    if not isinstance(count, int) or header.get("codebook_sizes") != [p.config.codebook_size for p in priors]:
        raise CompressedFileError(f"{path} has a header without pictures, or with other codebook_sizes than the prior.")
    pictures = [reader.picture(len(priors)) for _ in range(count)]
    classes = min((p.config.classes for p in priors if p.config.classes), default=2**31)
    for picture in pictures:
        if not -1 <= picture.label < classes:
            raise CompressedFileError(
                f"{path}: {picture.name!r} has label {picture.label}, the prior knows -1 (none) to {classes - 1}; "
                "the file was altered."
            )
    if reader.at != len(content):
        raise CompressedFileError(f"{path} goes on after its last picture; it was altered.")
    return pictures


class _Reader:
    def __init__(self, content: bytes, path: str):
        self.content, self.path, self.at = content, path, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.content):
            raise CompressedFileError(f"{self.path} ends early: it was cut; copy it again.")
        self.at += count
        return self.content[self.at - count : self.at]

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def checksum(self, begin: int, what: str) -> None:
        body = self.content[begin : self.at]
        if self.unpack("<I")[0] != zlib.crc32(body):
            raise CompressedFileError(
                f"{self.path}: {what} does not match its checksum; the file was altered, copy it again."
            )

    def header(self) -> dict:
        if self.take(len(MAGIC)) != MAGIC:
            raise CompressedFileError(f"{self.path} is not a file that `vqfast compress` wrote.")
        version, length = self.unpack("<HI")
        if version != VERSION:
            raise CompressedFileError(f"{self.path} has version {version}, this vqfast reads version {VERSION}.")
        text = self.take(min(length, _HEADER_LIMIT + 1) if length <= _HEADER_LIMIT else -1)
        self.checksum(0, "its header")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise CompressedFileError(f"{self.path} has a header that is no JSON; the file was altered.") from None
        return header if isinstance(header, dict) else {}

    def picture(self, levels: int) -> CompressedPicture:
        begin = self.at
        name = self.take(self.unpack("<H")[0]).decode("utf-8", "replace")
        width, height, label = self.unpack("<IIi")
        coded = []
        for _ in range(levels):
            rows, columns, length = self.unpack("<III")
            coded.append((rows, columns, self.take(length)))
        self.checksum(begin, f"picture {name!r}")
        if max(width * height, *(rows * columns for rows, columns, _ in coded)) > _PIXELS_LIMIT:
            raise CompressedFileError(
                f"{self.path}: {name!r} claims {width}x{height} pixels with codes of {[part[:2] for part in coded]}, more "
                f"than the limit of {_PIXELS_LIMIT}; the file was altered."
            )
        return CompressedPicture(name, width, height, label, coded)

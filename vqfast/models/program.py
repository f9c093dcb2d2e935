"""A network as a program of the incremental sampler: which sums go by rows, which by positions, over which buffers.

The words are those of `vqfast/reference_sample.py`. Weights are packed [panel][tap, channel][64 outputs], in the order
in which a
chain of multiply-adds consumes them; a gated panel holds 32 outputs and the 32 that gate them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from vqfast import reference_sample as words

from .prior_blocks import CausalConv2d

Tap = tuple[int, int, int, Tensor]  # buffer, dy, dx, weight [outputs, channels]

_EPILOGUES = {name: number for number, name in enumerate(words.EPILOGUES)}
_PHASES = {"row": 0, "pixel": 1}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the sampler runs.

    Attributes:
        words: int64 [n], buffers and instructions.
        weights: float32 [m], tables and packed weights.
        codebook_size, classes, condition_channels: what its inputs must look like.
    """

    words: Tensor
    weights: Tensor
    codebook_size: int
    classes: int
    condition_channels: int

    def to(self, device: torch.device | str) -> Program:
        return dataclasses.replace(self, words=self.words.to(device), weights=self.weights.to(device))

    def digest(self) -> str:
        """sha256 over words and weights: two programs with one digest give the same bits."""
        digest = hashlib.sha256()
        for tensor in (self.words, self.weights):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class ProgramBuilder:
    """Collects instructions; `finish` gives every buffer the rows and margins that its taps need."""

    def __init__(self, codebook_size: int, classes: int, condition_channels: int):
        self.codebook_size, self.classes, self.condition_channels = codebook_size, classes, condition_channels
        self._buffers: list[words.Buffer] = []
        self._code: list[words.Instruction] = []
        self._fills: list[tuple[int, int, Callable[[Tensor], object]]] = []
        self._size = 0
        self._logits = -1
        self.condition = -1
        if condition_channels:
            self.condition = self.ring(condition_channels)
            self._code.append(words.Condition(0, self.condition))

    # ---- buffers and weights ----

    def ring(self, channels: int) -> int:
        """A buffer of activations that keeps as many rows as its taps reach up."""
        self._buffers.append(words.Buffer(0, channels, 1, 0, 0))
        return len(self._buffers) - 1

    def channels(self, buffer: int) -> int:
        return self._buffers[buffer].channels

    def _cache(self, heads: int, key: int, value: int) -> int:
        self._buffers.append(words.Buffer(1, heads, key, value, 0))
        return len(self._buffers) - 1

    def _store(self, tensor: Tensor) -> int:
        """Offset of the tensor's float32 values in the weights."""
        return self._reserve(tensor.numel(), lambda out: out.copy_(tensor.detach().reshape(-1)))

    def _reserve(self, size: int, fill: Callable[[Tensor], object]) -> int:
        """Offset of `size` floats, aligned to 16, that `finish` lets `fill` write: a large network is copied once
        only."""
        offset = self._size
        self._fills.append((offset, size, fill))
        self._size += size + -size % 16
        return offset

    def taps(self, buffer: int, weight: Tensor, top: int = 0, left: int = 0) -> list[Tap]:
        """Taps of a torch kernel [outputs, channels, kh, kw] in raster order, its corner at (top, left) from the
        position."""
        kh, kw = weight.shape[2:]
        return [(buffer, top + i, left + j, weight[:, :, i, j]) for i in range(kh) for j in range(kw)]

    # ---- instructions ----

    def embed(self, table: Tensor) -> int:
        """A buffer with the embedding of the codes so far. table [K, channels]."""
        out, self._table = self.ring(table.shape[1]), self._store(table)
        self._code += [words.Embed(phase, table.shape[1], self._table, out) for phase in (0, 1)]
        return out

    def previous(self, codes: int) -> int:
        """A buffer with the embedding of the code just before each position; `codes` is what `embed` returned."""
        out = self.ring(self.channels(codes))
        self._code.append(words.Previous(1, self.channels(codes), self._table, out))
        return out

    def conv(
        self,
        phase: str,
        taps: list[Tap],
        *,
        bias: Tensor | None = None,
        init: int | None = None,
        classes: Tensor | None = None,
        epilogue: str = "none",
        out: int | None = None,
        raw: int | None = None,
        residual: int | None = None,
        act: int | None = None,
        act_kind: str = "relu",
    ) -> None:
        """out = epilogue(start + sum over taps) (+ residual); start is bias (+ class row), or the buffer `init`.

        `raw` also keeps the sum before the epilogue, `act` a relu or elu of `out`.
        """
        outputs = taps[0][3].shape[0]
        for buffer, dy, dx, weight in taps:
            self._reach(buffer, dy, dx)
            assert weight.shape[0] == outputs and dy <= 0
        start = (1, init) if init is not None else (0, self._store(torch.zeros(outputs) if bias is None else bias))
        table = -1 if classes is None else self._store(classes)
        gated, weights = epilogue in ("gate", "glu"), [tap[3].detach() for tap in taps]
        packed = self._reserve(packed_size(weights, gated), lambda flat: pack(weights, gated, flat))
        optional = (-1 if buffer is None else buffer for buffer in (out, raw, residual, act))
        found = tuple(words.Tap(buffer, dy, dx, weight.shape[1]) for buffer, dy, dx, weight in taps)
        kinds = _EPILOGUES[epilogue], _EPILOGUES[act_kind]
        self._code.append(words.Conv(_PHASES[phase], outputs, kinds[0], *start, table, packed, *optional, kinds[1], found))

    def causal(self, buffer: int, layer: CausalConv2d, *, extra: list[Tap] | None = None, **options) -> None:
        """A causal convolution: the taps above the row go by rows, the taps in it by positions; one chain all the same.

        `extra` taps (a condition or auxiliary features) come last in the chain.
        """
        rest = self.taps(buffer, layer.row.weight, 0, -layer.reach) + (extra or [])
        if layer.above is None:
            return self.conv("pixel", rest, bias=layer.row.bias, **options)
        start = self.ring(layer.row.out_channels)
        self.conv(
            "row", self.taps(buffer, layer.above.weight, -layer.reach, -layer.reach), bias=layer.row.bias, out=start
        )
        return self.conv("pixel", rest, init=start, **options)

    def relu_of(self, buffer: int) -> int:
        """Makes the instruction that wrote `buffer` last also write its relu; returns where."""
        act = self.ring(self.channels(buffer))
        place = max(n for n, i in enumerate(self._code) if isinstance(i, words.Conv) and i.out == buffer)
        self._code[place] = self._code[place]._replace(act=act, act_kind=_EPILOGUES["relu"])
        return act

    def attend(self, q: int, k: int, v: int, heads: int) -> int:
        key, value = self.channels(q) // heads, self.channels(v) // heads
        out, cache = self.ring(heads * value), self._cache(heads, key, value)
        scale = self._store(torch.tensor([key**-0.5]))
        self._code.append(words.Attend(1, heads, key, value, q, k, v, out, cache, scale))
        return out

    def logits(self, taps: list[Tap], bias: Tensor) -> None:
        self._logits = self.ring(self.codebook_size)
        self.conv("pixel", taps, bias=bias, out=self._logits)

    def finish(self) -> Program:
        sizes = (self.codebook_size, self.classes, self.condition_channels)
        header = words.Header(words.VERSION, len(self._buffers), len(self._code), sizes[0], self._logits, *sizes[1:])
        stream = [*header, *(n for b in self._buffers for n in b)]
        stream += [n for i in self._code for n in words.write_instruction(i)]
        weights = torch.empty(self._size)
        for offset, size, fill in self._fills:
            fill(weights[offset : offset + size])
            weights[offset + size : offset + size + -size % 16] = 0.0
        return Program(torch.tensor(stream, dtype=torch.int64), weights, *sizes)

    def _reach(self, buffer: int, dy: int, dx: int) -> None:
        b = self._buffers[buffer]
        self._buffers[buffer] = b._replace(rows=max(b.rows, 1 - dy), left=max(b.left, -dx), right=max(b.right, dx))


def packed_size(weights: list[Tensor], gated: bool) -> int:
    parts = 2 if gated else 1
    panels = -(-(weights[0].shape[0] // parts) // (words.PANEL // parts))
    return panels * sum(w.shape[1] for w in weights) * words.PANEL


def pack(weights: list[Tensor], gated: bool, flat: Tensor) -> None:
    """Weights [outputs, channels] of consecutive taps -> flat, [panels, depth, 64]; see the module's first lines."""
    parts = 2 if gated else 1
    columns, per_part = words.PANEL // parts, weights[0].shape[0] // parts
    panels = -(-per_part // columns)
    packed, at = flat.view(panels, -1, parts, columns), 0
    for weight in weights:
        if per_part != panels * columns:  # the last panel's missing outputs are zeros
            padded = weight.new_zeros(parts, panels * columns, weight.shape[1])
            padded[:, :per_part] = weight.reshape(parts, per_part, -1)
            weight = padded.flatten(0, 1)
        packed[:, at : at + weight.shape[1]].copy_(weight.unflatten(0, (parts, panels, columns)).permute(1, 3, 0, 2))
        at += weight.shape[1]

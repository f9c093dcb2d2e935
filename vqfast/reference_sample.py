"""What `sample` means, in plain torch: an interpreter of its programs with the canonical arithmetic emulated in
float64.

A float32 fused multiply-add is a float64 product (exact), a float64 sum rounded to odd, and one rounding to
float32, which is
the correctly rounded result since 53 >= 24 + 2 bits. So tokens and logits equal those of the native kernels bit
for bit, on any
device, only slowly. With exact=False the same interpreter uses torch's matrix products: the cached path for other
devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = 1
DRAW, SCORE = 0, 1
PANEL = 64
EPILOGUES = ("none", "relu", "elu", "gate", "glu")  # gate: tanh(a) sigmoid(b); glu: a sigmoid(b)
_NONE, _RELU, _ELU, _GATE, _GLU = range(5)

# ---- programs ----------------------------------------------------------------------------------------------
# The words of a program, in the order of these fields; csrc/cpu/sample.cpp reads the same. Offsets point into the float32
# weights, -1 means absent. Phase 0 runs once per row for all its columns and reads rows above, phase 1 once per position.


class Header(NamedTuple):
    """A program's first words; its buffers and then its instructions follow."""

    version: int
    buffers: int
    instructions: int
    codebook_size: int
    logits: int  # buffer
    classes: int
    condition: int  # channels


class Buffer(NamedTuple):
    """kind 0: a ring of rows with zero margins left and right. kind 1: an attention cache of the whole map, whose fields
    are 1, heads, key channels, value channels, 0."""

    kind: int
    channels: int
    rows: int
    left: int
    right: int


class Embed(NamedTuple):
    """The embedding of the row above (phase 0) or of the columns before the range (phase 1)."""

    phase: int
    channels: int
    table: int
    out: int


class Condition(NamedTuple):
    phase: int
    out: int


class Tap(NamedTuple):
    buffer: int
    dy: int
    dx: int
    channels: int


class Conv(NamedTuple):
    """out = epilogue(start + sum over taps) + residual. start_kind 0: `start` is the offset of a bias; 1: a buffer."""

    phase: int
    outputs: int
    epilogue: int
    start_kind: int
    start: int
    classes: int
    weights: int
    out: int
    raw: int
    residual: int
    act: int
    act_kind: int
    taps: tuple[Tap, ...]


class Attend(NamedTuple):
    phase: int
    heads: int
    key: int
    value: int
    q: int
    k: int
    v: int
    out: int
    cache: int
    scale: int


class Previous(NamedTuple):
    """The embedding of the code just before in raster order, zeros at the start."""

    phase: int
    channels: int
    table: int
    out: int


Instruction = Embed | Condition | Conv | Attend | Previous
_KINDS: tuple[type, ...] = (Embed, Condition, Conv, Attend, Previous)  # the first word is the place here, from 1 on


def write_instruction(i: Instruction) -> list[int]:
    """An instruction as words: its kind, its fields; taps as their number and then each one's fields."""
    words = [1 + _KINDS.index(type(i)), *(i[:-1] if isinstance(i, Conv) else i)]
    return words + ([len(i.taps), *(n for tap in i.taps for n in tap)] if isinstance(i, Conv) else [])


def _read_instruction(words: Iterator[int]) -> Instruction:
    kind = _KINDS[next(words) - 1]
    if kind is not Conv:
        return _read(kind, words)
    fields = [next(words) for _ in Conv._fields[:-1]]
    return Conv(*fields, tuple(_read(Tap, words) for _ in range(next(words))))


def _read(kind: type, words: Iterator[int]):
    return kind(*(next(words) for _ in kind._fields))


# ---- arithmetic --------------------------------------------------------------------------------------------


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """float32 x * y + z with one rounding."""
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    # Round to odd: an inexact sum with an even last bit moves one step towards the exact value.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & (bits & 1 == 0) & total.isfinite()
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def exp32(x: Tensor) -> Tensor:
    def constant(value):
        return torch.tensor(value, dtype=torch.float32, device=x.device)

    x = x.clamp(-86.0, 88.0)
    t = fma(x, constant(1.44269504088896341), constant(12582912.0))
    n = t - constant(12582912.0)
    r = fma(n, constant(2.12194440e-4), fma(n, constant(-0.693359375), x))
    p = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p.expand_as(r), r, constant(c))
    p = fma(p, r * r, r)
    y = p + constant(1.0)
    return (y.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)


def gate_exact(a: Tensor, b: Tensor) -> Tensor:
    ea = exp32((a * -2.0).clamp(-20.0, 20.0))
    eb = exp32((b * -1.0).clamp(-60.0, 60.0))
    return (1.0 - ea) / ((1.0 + ea) * (1.0 + eb))


def glu_exact(a: Tensor, b: Tensor) -> Tensor:
    return a / (1.0 + exp32((b * -1.0).clamp(-60.0, 60.0)))


def elu_exact(a: Tensor) -> Tensor:
    return torch.where(a > 0, a, exp32(a.clamp(max=0.0)) - 1.0)


class Exact:
    """The canonical arithmetic."""

    gate, glu, elu = staticmethod(gate_exact), staticmethod(glu_exact), staticmethod(elu_exact)

    @staticmethod
    def chain(acc: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """acc [M, n] + x [M, depth] @ weight [depth, n], ascending, one fused multiply-add each."""
        for c in range(x.shape[1]):
            acc = fma(x[:, c, None].expand_as(acc), weight[c].expand_as(acc), acc)
        return acc

    @staticmethod
    def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """One query [key] over keys [t, key] and values [t, value]."""
        scores = Exact.chain(q.new_zeros(1, keys.shape[0]), q[None], keys.T)[0] * scale
        weights = exp32(scores - scores.max())
        padded = torch.cat([weights, weights.new_zeros(-len(weights) % 16)]).view(-1, 16)
        lanes = padded[0]
        for row in padded[1:]:
            lanes = lanes + row
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        return Exact.chain(q.new_zeros(1, values.shape[1]), weights[None], values)[0] / lanes[0]


class Fast:
    """torch's own matrix products and activations: close, fast on every device, not bit for bit."""

    elu = staticmethod(torch.nn.functional.elu)

    @staticmethod
    def gate(a, b):
        return a.tanh() * b.sigmoid()

    @staticmethod
    def glu(a, b):
        return a * b.sigmoid()

    @staticmethod
    def chain(acc, x, weight):
        return torch.addmm(acc, x, weight)

    @staticmethod
    def attend(q, keys, values, scale):
        return torch.softmax(keys @ q * scale, 0) @ values


# ---- drawing -----------------------------------------------------------------------------------------------


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping), with logical shifts."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = 0x9E3779B97F4A7C15


def log64(x: Tensor) -> Tensor:
    bits = x.view(torch.int64)
    e = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (e << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(z, 1.0 / 21)
    for odd in (19, 17, 15, 13, 11, 9, 7, 5, 3):
        p = p * z + 1.0 / odd
    small = (s * z) * p
    return e.double() * 0.6931471805599453 + (2.0 * s + 2.0 * small)


def exp64(x: Tensor) -> Tensor:
    """exp of x <= 0."""
    clipped = x.clamp(min=-700.0)
    shifted = clipped * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = (clipped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = torch.full_like(r, 1.0 / 6227020800.0)
    for c in (479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0):
        p = p * r + 1.0 / c
    for c in (0.5, 1.0, 1.0):
        p = p * r + c
    y = (p.view(torch.int64) + (shifted.view(torch.int64) << 52)).view(torch.float64)
    return torch.where(x < -700.0, 0.0, y)


def _ascending_sum(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for value in x.cpu():
        total = total + value
    return total


def gumbel(codebook_size: int, seed: int, image: int, position: int, device=None) -> Tensor:
    """-log(-log u) for every code; u is a hash of (seed, image, position, code)."""
    state = _mix(torch.tensor(_signed(seed + _GOLDEN)))
    state = _mix(state ^ _signed(image + 2 * _GOLDEN))
    state = _mix(state ^ _signed(position + 3 * _GOLDEN))
    r = _mix(state + torch.arange(1, codebook_size + 1) * _signed(_GOLDEN))
    u = ((_shift(r, 12) | 0x3FF0000000000000).view(torch.float64) - 1.0) + 2.0**-53
    return (-log64(-log64(u))).to(device)


def draw_token(
    logits: Tensor, seed: int, image: int, position: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """argmax over the kept codes of logit / temperature + Gumbel noise. logits [K] float32."""
    z = logits.double() if temperature == 0 else logits.double() / temperature
    lowest = torch.finfo(torch.float64).min
    z = torch.where(z >= lowest, z, lowest)
    if temperature == 0:
        return int(z.argmax())
    keep = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < len(z) or top_p < 1:
        order = torch.sort(z, descending=True, stable=True).indices[: top_k or None]
        if top_p < 1:
            weight = exp64(z[order] - z[order[0]]).cpu()
            before = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(weight, 0)[:-1]])
            order = order[: int((before < top_p * _ascending_sum(weight)).sum())]
        keep = torch.zeros_like(keep).index_fill(0, order, True)
    z = z + gumbel(len(z), seed, image, position, z.device)
    return int(torch.where(keep, z, -torch.inf).argmax())


def token_log_prob(logits: Tensor, token: int) -> float:
    z = logits.double()
    top = z.max()
    return float((z[token] - top).cpu() - log64(_ascending_sum(exp64(z - top))))


# ---- the machine -------------------------------------------------------------------------------------------


class Machine:
    """Reads a program and lays out its workspace, as csrc/cpu/sample.cpp does."""

    def __init__(self, program: Tensor, batch: int, height: int, width: int):
        self.batch, self.height, self.width = batch, height, width
        words = iter(program.tolist())
        self.header = _read(Header, words)
        if self.header.version != VERSION:
            raise ValueError("sample: malformed program: unknown version; build it with vqfast.models.")
        self.buffers = [_read(Buffer, words) for _ in range(self.header.buffers)]
        self.offsets, self.size = [], 0
        for b in self.buffers:
            self.offsets.append(self.size)
            self.size += batch * self._floats(b)
        self.code = [_read_instruction(words) for _ in range(self.header.instructions)]

    def _floats(self, b: Buffer) -> int:
        if b.kind == 0:
            return b.rows * (b.left + self.width + b.right) * _up16(b.channels)
        steps = self.height * self.width
        return b.channels * (b.rows * _up16(steps) + steps * _up16(b.left))


def _up16(n: int) -> int:
    return (n + 15) // 16 * 16


class _Run:
    def __init__(self, machine: Machine, workspace: Tensor, weights: Tensor, tokens, condition, labels, arithmetic):
        self.m, self.weights, self.tokens, self.condition, self.labels = machine, weights, tokens, condition, labels
        self.arithmetic = arithmetic
        self.views = [self._view(workspace, i) for i in range(len(machine.buffers))]

    def _view(self, workspace: Tensor, index: int):
        kind, channels, rows, left, right = self.m.buffers[index]
        at, batch = self.m.offsets[index], self.m.batch
        if kind == 0:
            shape = (rows, left + self.m.width + right, batch, _up16(channels))
            count = rows * shape[1] * batch * shape[3]
            return workspace[at : at + count].view(shape)
        steps = self.m.height * self.m.width
        items, keys = batch * channels, rows * _up16(steps)
        both = workspace[at : at + items * (keys + steps * _up16(left))].view(batch, channels, -1)
        return both[..., :keys].view(batch, channels, rows, -1), both[..., keys:].view(batch, channels, steps, -1)

    def place(self, buffer: int, row: int, c0: int, c1: int, channels: int) -> Tensor:
        """The cells of columns c0..c1-1 of a row, [columns, batch, channels], as a view."""
        view, left = self.views[buffer], self.m.buffers[buffer].left
        return view[row % view.shape[0], left + c0 : left + c1, :, :channels]

    def execute(self, i: Instruction, row: int, c0: int, c1: int) -> None:
        codebook_size = self.m.header.codebook_size
        if isinstance(i, Embed):
            first, last, at = (0, self.m.width, row - 1) if i.phase == 0 else (max(c0 - 1, 0), c1 - 1, row)
            if at >= 0 and last > first:
                codes = self.tokens[:, at, first:last].T.clamp(0, codebook_size - 1)
                self.place(i.out, at, first, last, i.channels).copy_(self._table(i)[codes])
        elif isinstance(i, Previous):
            flat = self.tokens.reshape(self.m.batch, -1).clamp(0, codebook_size - 1)
            for column in range(c0, c1):
                before = row * self.m.width + column - 1
                target = self.place(i.out, row, column, column + 1, i.channels)[0]
                target.copy_(self._table(i)[flat[:, before]] if before >= 0 else torch.zeros_like(target))
        elif isinstance(i, Condition):
            found = self.condition[:, row, c0:c1].transpose(0, 1)
            self.place(i.out, row, c0, c1, self.m.header.condition).copy_(found)
        elif isinstance(i, Conv):
            self._convolve(i, row, c0, c1)
        else:
            self._attend(i, row, c0, c1)

    def _table(self, i: Embed | Previous) -> Tensor:
        return self.weights[i.table : i.table + self.m.header.codebook_size * i.channels].view(-1, i.channels)

    def _convolve(self, i: Conv, row: int, c0: int, c1: int) -> None:
        n, cells = i.outputs, (c1 - c0, self.m.batch)
        if i.start_kind:
            acc = self.place(i.start, row, c0, c1, n)
        else:
            acc = self.weights[i.start : i.start + n].expand(*cells, n)
        if i.classes >= 0 and self.labels is not None:
            table = self.weights[i.classes : i.classes + self.m.header.classes * n].view(-1, n)
            extra = table[self.labels.clamp_min(0)]
            acc = torch.where((self.labels >= 0)[:, None], acc + extra, acc)
        acc = acc.reshape(-1, n)
        weight = unpack(self.weights[i.weights :], n, sum(tap.channels for tap in i.taps), i.epilogue >= _GATE)
        at = 0
        for buffer, dy, dx, channels in i.taps:
            x = self.place(buffer, row + dy, c0 + dx, c1 + dx, channels).reshape(-1, channels)
            acc = self.arithmetic.chain(acc, x, weight[at : at + channels])
            at += channels
        if i.raw >= 0:
            self.place(i.raw, row, c0, c1, n).copy_(acc.view(*cells, n))
        if i.out < 0:
            return
        value = self._activate(i.epilogue, acc)
        value = value.reshape(*cells, -1)
        if i.residual >= 0:
            value = value + self.place(i.residual, row, c0, c1, value.shape[-1])
        self.place(i.out, row, c0, c1, value.shape[-1]).copy_(value)
        if i.act >= 0:
            self.place(i.act, row, c0, c1, value.shape[-1]).copy_(self._activate(i.act_kind, value))

    def _activate(self, kind: int, x: Tensor) -> Tensor:
        if kind == _RELU:
            return torch.where(x > 0, x, 0.0)
        if kind == _ELU:
            return self.arithmetic.elu(x)
        if kind in (_GATE, _GLU):
            return (self.arithmetic.gate if kind == _GATE else self.arithmetic.glu)(*x.chunk(2, dim=-1))
        return x

    def _attend(self, i: Attend, row: int, c0: int, c1: int) -> None:
        heads, key, value = i.heads, i.key, i.value
        keys, values = self.views[i.cache]
        for column in range(c0, c1):
            t = row * self.m.width + column
            query, new_k, new_v = (
                self.place(b, row, column, column + 1, heads * n)[0] for b, n in ((i.q, key), (i.k, key), (i.v, value))
            )
            keys[..., t] = new_k.view(-1, heads, key)
            values[:, :, t, :value] = new_v.view(-1, heads, value)
            target = self.place(i.out, row, column, column + 1, heads * value)[0]
            for b in range(self.m.batch):
                for h in range(heads):
                    target[b, h * value : (h + 1) * value] = self.arithmetic.attend(
                        query[b, h * key : (h + 1) * key],
                        keys[b, h, :, : t + 1].T,
                        values[b, h, : t + 1, :value],
                        float(self.weights[i.scale]),
                    )


def unpack(packed: Tensor, outputs: int, depth: int, gated: bool) -> Tensor:
    """Packed panels -> [depth, outputs]; the inverse of vqfast.models.program.pack."""
    parts = 2 if gated else 1
    columns, per_part = PANEL // parts, outputs // parts
    panels = -(-per_part // columns)
    wide = packed[: panels * depth * PANEL].view(panels, depth, parts, columns)
    return wide.permute(1, 2, 0, 3).reshape(depth, parts, -1)[..., :per_part].reshape(depth, outputs)


@torch.no_grad()
def sample(
    workspace,
    tokens,
    evaluated,
    logits,
    log_prob,
    program,
    weights,
    given,
    condition,
    labels,
    start,
    stop,
    mode,
    lookahead,
    seed,
    first_image,
    temperature,
    top_k,
    top_p,
    threads,
    arithmetic=Exact,
) -> None:
    """The op; arguments as vqfast.ops.sample.run_program. `lookahead` and `threads` change nothing in the result."""
    batch, height, width = tokens.shape
    machine = Machine(program, batch, height, width)
    if workspace.numel() < machine.size:
        raise ValueError(f"sample: the workspace holds {workspace.numel()} floats, the program needs {machine.size}.")
    if not 0 <= start <= stop <= height * width or (mode == SCORE and (start % width or stop % width)):
        raise ValueError("sample: 0 <= start <= stop <= height * width is needed, and whole rows for scoring.")
    if start == 0:
        workspace[: machine.size] = 0.0
    run = _Run(machine, workspace, weights, tokens, condition, labels, arithmetic)
    step = width if mode == SCORE else 1
    for position in range(start, stop, step):
        row, c0 = divmod(position, width)
        for phase, begin, end in ((0, 0, width), (1, c0, c0 + step)):
            for i in machine.code:
                if i.phase == phase and (phase == 1 or c0 == 0):
                    run.execute(i, row, begin, end)
        evaluated += step
        values = run.place(machine.header.logits, row, c0, c0 + step, machine.header.codebook_size)
        for column in range(c0, c0 + step):
            for b in range(batch):
                z, at = values[column - c0, b], row * width + column
                if mode == DRAW and not (given is not None and given[b, row, column]):
                    tokens[b, row, column] = draw_token(z, seed, first_image + b, at, temperature, top_k, top_p)
                if logits is not None:
                    logits[b, row, column] = z
                if log_prob is not None:
                    log_prob[b, row, column] = token_log_prob(z, int(tokens[b, row, column]))

"""k-means: Lloyd's iteration and mini-batches on the exact search and the exact statistics, over memory or files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vqfast import _backends, _border
from vqfast.ops import _shapes
from vqfast.ops.ema import code_stats

# Rows read at a time. Sums are rounded once a piece, so this is part of the result's definition and never tuned by machine.
_PIECE = 1 << 17
_RUN = 32  # consecutive rows that a mini-batch takes together: some KiB of a file, where single rows would each cost a page
_SAMPLE = 64  # rows per code among which k-means++ draws
_REFUSALS = 32  # draws in a row that k-means++ may refuse before it looks at all distances again
# Share of a code's weight that a mini-batch pass hands to the next one. On encoder outputs 1 (Sculley's rule) stays above the
# inertia that Lloyd's steps reach in as many passes, 0 lets each pass forget the last; a quarter is best or near it throughout.
_CARRIED = 0.25


class KMeans(NamedTuple):
    """Result of `kmeans`: codebook [K, D] float32 (float64 for float64 rows), indices [N] int64, inertia (mean squared distance, float64)."""

    codebook: Tensor
    indices: Tensor
    inertia: Tensor


class RowSource(Protocol):
    """Rows [N, D] that are made or read when they are asked for, by a slice or by int64 positions [n]."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, at: slice | Tensor) -> Tensor: ...


@torch.no_grad()
def kmeans(
    x: Tensor | RowSource,
    codebook_size: int,
    *,
    iterations: int = 10,
    init: str | Tensor = "random",
    seed: int = 0,
    batch_rows: int | None = None,
    backend: str | None = None,
) -> KMeans:
    """Cluster rows with Lloyd's algorithm, or with mini-batches.

    **Shapes**: x [..., D] -> codebook [K, D].

    Args:
        x: rows, floating; rows with NaN or Inf are left out. Also any `RowSource`: rows are then read a piece at a time, and
            `vqfast.data.open_latents` and `TokenLatents` make sources of files that need not fit in memory.
        codebook_size: K, at most the number of finite rows.
        iterations: passes over the rows, at least 0.
        init: "random" (K rows drawn without replacement), "k-means++" (Arthur and Vassilvitskii 2007, on 64 rows per code), or
            the codes [K, D] to start from.
        seed: of the draws; same rows and seed give the same bits.
        batch_rows: None moves the codes once a pass, to the means of their rows (Lloyd). A number moves them after every so many
            rows, each by its rows' share of all that it has been given (Sculley 2010; here a pass carries over a quarter of the
            weight of the one before): fewer passes for the same inertia. 4 to 16 rows per code are a good number.
        backend: see `nearest`.

    Returns:
        KMeans(codebook, indices, inertia); indices cover the finite rows, in order.

    Raises:
        ValueError: fewer finite rows than codes, or a bad argument.

    Memory: O(N + K D) and one piece of 131,072 rows.

    A code that loses all its rows is moved to a row far from its own code (the farthest rows, one each). Lloyd's iteration ends
    early when no row changes its code.
    """
    if isinstance(x, Tensor):
        _shapes.check_float("x", x)
    elif not (len(getattr(x, "shape", ())) == 2 and getattr(x, "dtype", None) in _shapes.FLOATS):
        raise TypeError(f"x must be a torch.Tensor or have shape (N, D), a floating torch dtype and rows x[a:b], got {type(x).__name__}.")
    if codebook_size < 1 or iterations < 0 or (batch_rows is not None and batch_rows < 1):
        raise ValueError(
            "codebook_size and batch_rows must be at least 1 and iterations at least 0, got"
            f" {codebook_size}, {batch_rows} and {iterations}."
        )
    rows = _Rows(x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) else x, backend)
    if rows.count < codebook_size:
        raise ValueError(
            f"k-means needs at least as many finite rows as codes: x has {rows.count} of them, codebook_size is"
            f" {codebook_size}. Give it more rows or ask for fewer codes."
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    codebook = _start(rows, codebook_size, init, generator)
    if batch_rows is None:
        codebook, guess = _lloyd(rows, codebook, iterations)
    else:
        codebook, guess = _mini_batch(rows, codebook, iterations, batch_rows, generator), None
    found = rows.assign(codebook, guess)
    return KMeans(codebook, found.indices, found.distance.to(torch.float64).mean())


class _Assigned(NamedTuple):
    """One pass over the rows: sums [K, D] float64, counts [K], and indices and distance [N]."""

    sums: Tensor
    counts: Tensor
    indices: Tensor
    distance: Tensor


class _Rows:
    """The finite rows of a source, and the search over them."""

    def __init__(self, source: Tensor | RowSource, backend: str | None):
        self.source, self.backend = source, backend
        self.wide = torch.float64 if source.dtype == torch.float64 else torch.float32
        total = source.shape[0]
        finite = [_finite(source[begin : begin + _PIECE]) for begin in range(0, total, _PIECE)]
        finite = torch.cat(finite) if finite else torch.empty(0, dtype=torch.bool)
        self.count = int(finite.sum())
        # Positions of the finite rows; None when these are all.
        self.kept = None if self.count == total else finite.nonzero().squeeze(-1)

    def take(self, at: Tensor) -> Tensor:
        """The finite rows at positions `at` [n]."""
        device = self.source.device if isinstance(self.source, Tensor) else None
        return self.source[at.to(device)] if self.kept is None else self.source[self.kept[at.to(self.kept.device)]]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first position, rows) of all finite rows, in order."""
        for begin in range(0, self.count, _PIECE):
            end = min(self.count, begin + _PIECE)
            yield begin, self.source[begin:end] if self.kept is None else self.source[self.kept[begin:end]]

    def search(self, rows: Tensor, codebook: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distance and index [n] of each row's nearest code; a guess [n] may save time."""
        chosen = _backends.choose("nearest", self.backend, rows, codebook)
        guess = None if guess is None else guess[None, None]
        distance, indices = _border.call("nearest", chosen)(rows[None, None], codebook[None], 0, None, None, guess)
        return distance[0, 0], indices[0, 0]

    def assign(self, codebook: Tensor, guess: Tensor | None = None) -> _Assigned:
        """Statistics of all rows by their nearest codes."""
        sums = torch.zeros_like(codebook, dtype=torch.float64)
        counts = codebook.new_zeros(len(codebook), dtype=torch.int64)
        found = []
        for begin, rows in self.pieces():
            own = None if guess is None else guess[begin : begin + len(rows)]
            distance, indices = self.search(rows, codebook, own)
            stats = code_stats(rows, indices, len(codebook), backend=self.backend)
            sums += stats.sums
            counts += stats.counts
            found.append((indices, distance))
            del rows  # before the next piece is read: one is in memory at a time
        indices, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
        return _Assigned(sums, counts, indices, distance)


def _finite(rows: Tensor) -> Tensor:
    """Which rows hold no NaN and no infinity; unlike isfinite, without a copy of the rows."""
    low, high = rows.aminmax(dim=-1)
    return (low > -torch.inf) & (high < torch.inf)


def _lloyd(rows: _Rows, codebook: Tensor, iterations: int) -> tuple[Tensor, Tensor | None]:
    """The codes after `iterations` steps, and the rows' codes in the last one."""
    before = None
    for _ in range(iterations):
        # Most rows keep their code, so the last one is a good first bound.
        found = rows.assign(codebook, before)
        empty = found.counts == 0
        means = (found.sums / found.counts.clamp(min=1)[:, None]).to(codebook.dtype)
        # Sums of very large values overflow: then a code stays where it is.
        codebook = torch.where(empty[:, None] | ~means.isfinite().all(-1, keepdim=True), codebook, means)
        if before is not None and torch.equal(before, found.indices) and not empty.any():
            break
        before = found.indices
        codebook = _reseed(codebook, empty, found.distance, rows.take)
    return codebook, before


def _mini_batch(rows: _Rows, codebook: Tensor, passes: int, batch_rows: int, generator: torch.Generator) -> Tensor:
    weight = torch.zeros(len(codebook), 1, dtype=torch.float64, device=codebook.device)
    for _ in range(passes):
        weight *= _CARRIED
        seen = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)
        for at in _shuffled_runs(rows.count, generator).split(batch_rows):
            batch = rows.take(at)
            distance, indices = rows.search(batch, codebook)
            sums, counts = code_stats(batch, indices, len(codebook), backend=rows.backend)
            seen += counts
            weight += counts[:, None]
            step = (sums.to(torch.float64) - counts[:, None] * codebook) / weight.clamp(min=1)
            moved = (codebook + step).to(codebook.dtype)
            codebook = torch.where(moved.isfinite().all(-1, keepdim=True), moved, codebook)
            del batch  # before the next one is read: one is in memory at a time
        codebook = _reseed(codebook, seen == 0, distance, lambda far, last=at: rows.take(last[far.to(last.device)]))
    return codebook


def _shuffled_runs(count: int, generator: torch.Generator) -> Tensor:
    """All positions 0..count-1, in runs of _RUN neighbours, the runs in random order."""
    order = torch.randperm(-(-count // _RUN), generator=generator)
    at = (order[:, None] * _RUN + torch.arange(_RUN)).flatten()
    return at[at < count]


def _reseed(codebook: Tensor, empty: Tensor, distance: Tensor, take) -> Tensor:
    """Codes without rows go to the rows that lie farthest from their own codes, as far as there are rows."""
    codes = empty.nonzero().squeeze(-1)
    if not len(codes):
        return codebook
    far = distance.argsort(descending=True, stable=True)[: len(codes)]
    return codebook.index_copy(0, codes[: len(far)], take(far).to(codebook.dtype))


# ---- starts ----------------------------------------------------------------------------------------------------------------


def _start(rows: _Rows, k: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(init, Tensor):
        _shapes.check_float("init", init)
        if tuple(init.shape) != (k, rows.source.shape[-1]) or not bool(init.isfinite().all()):
            raise ValueError(f"init is {_shapes.describe(init)}; it must hold {k} finite codes of {rows.source.shape[-1]} values.")
        return init.to(rows.wide)
    if init not in _STARTS:
        raise ValueError(f"init {init!r} is not known; use one of {', '.join(_STARTS)}, or codes [K, D].")
    return _STARTS[init](rows, k, generator)


def _start_random(rows: _Rows, k: int, generator: torch.Generator) -> Tensor:
    return rows.take(torch.randperm(rows.count, generator=generator)[:k]).to(rows.wide)


def _start_plus_plus(rows: _Rows, k: int, generator: torch.Generator) -> Tensor:
    """Codes drawn one after the other, each row with a chance proportional to its squared distance to the nearest so far.

    Distances to the newest codes are found for many of them together, and until then a row is drawn by its older distance and
    taken with the chance new / old: the same distribution (rejection sampling).
    """
    some = torch.randperm(rows.count, generator=generator)[: _SAMPLE * k].sort().values
    values = rows.take(some).to(rows.wide)
    codebook = values.new_empty(k, values.shape[1])
    codebook[0] = values[int(torch.randint(len(values), (1,), generator=generator))]
    # A distance beyond the dtype counts as the largest there is: nothing can be drawn in proportion to infinity.
    distance, drawn = rows.search(values, codebook[:1])[0].clamp(max=torch.finfo(values.dtype).max), 1
    while drawn < k:
        before, drawn = drawn, _draw_codes(values, distance, codebook, drawn, min(k, drawn + max(16, drawn // 4)), generator)
        distance = torch.minimum(distance, rows.search(values, codebook[before:drawn])[0])
    return codebook


def _draw_codes(values: Tensor, distance: Tensor, codebook: Tensor, begin: int, most: int, generator: torch.Generator) -> int:
    """Fill codebook[begin:most], or less when the distances [N], which do not know these codes, get too old; returns the end."""
    reach = distance.to(torch.float64).cpu().cumsum(0)
    at, refused = begin, 0
    while at < most and (refused < _REFUSALS or at == begin):
        target, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        picked = min(len(values) - 1, int(torch.searchsorted(reach, target * reach[-1], right=True)))
        old = new = float(distance[picked])
        if at > begin:
            new = min(old, float((codebook[begin:at] - values[picked]).square().sum(-1).min()))
        # When every row is a code already any row will do: Lloyd's re-seeding takes care of the duplicates.
        if chance * old < new or reach[-1] == 0:
            codebook[at] = values[picked]
            at, refused = at + 1, 0
        else:
            refused += 1
    return at


_STARTS = {"random": _start_random, "k-means++": _start_plus_plus}

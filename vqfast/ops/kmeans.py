"""k-means: Lloyd's iteration on the exact search and the exact statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops import _shapes
from vqfast.ops.ema import code_stats
from vqfast.ops.nearest import nearest


class KMeans(NamedTuple):
    """Result of `kmeans`: codebook [K, D] float32, indices [N] int64, inertia (mean squared distance, float64 scalar)."""

    codebook: Tensor
    indices: Tensor
    inertia: Tensor


@torch.no_grad()
def kmeans(
    x: Tensor, codebook_size: int, *, iterations: int = 10, init: str = "random", seed: int = 0, backend: str | None = None
) -> KMeans:
    """Cluster rows with Lloyd's algorithm.

    **Shapes**: x [..., D] -> codebook [K, D].

    Args:
        x: rows, floating; rows with NaN or Inf are left out.
        codebook_size: K, at most the number of finite rows.
        iterations: Lloyd steps, at least 0.
        init: "random" (K rows drawn without replacement) or "k-means++" (Arthur and Vassilvitskii 2007).
        seed: of the draw; same rows and seed give the same bits.
        backend: see `nearest`.

    Returns:
        KMeans(codebook, indices, inertia); indices cover the finite rows, in order.

    Raises:
        ValueError: fewer finite rows than codes, or a bad argument.

    A code that loses all its rows is moved to a row far from its own code (the farthest rows, one each).
    """
    _shapes.check_float("x", x)
    if codebook_size < 1 or iterations < 0:
        raise ValueError(f"codebook_size must be at least 1 and iterations at least 0, got {codebook_size} and {iterations}.")
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[rows.isfinite().all(-1)]
    if rows.shape[0] < codebook_size:
        raise ValueError(
            f"k-means needs at least as many finite rows as codes: x has {rows.shape[0]} of them, codebook_size is"
            f" {codebook_size}. Give it more rows or ask for fewer codes."
        )
    if init not in _STARTS:
        raise ValueError(f"init {init!r} is not known; use one of {', '.join(_STARTS)}.")
    codebook = _STARTS[init](rows, codebook_size, torch.Generator("cpu").manual_seed(seed))
    for _ in range(iterations):
        found = nearest(rows, codebook, backend=backend)
        sums, counts = code_stats(rows, found.indices, codebook_size, backend=backend)
        codebook = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], codebook.to(sums.dtype))
        codebook = _reseed_empty(codebook, counts, rows, found.distance)
    found = nearest(rows, codebook, backend=backend)
    return KMeans(codebook, found.indices, found.distance.to(torch.float64).mean())


def _reseed_empty(codebook: Tensor, counts: Tensor, rows: Tensor, distance: Tensor) -> Tensor:
    empty = (counts == 0).nonzero().squeeze(-1)
    if not len(empty):
        return codebook
    far = distance.argsort(descending=True, stable=True)[: len(empty)]
    return codebook.index_copy(0, empty, rows[far].to(codebook.dtype))


def _start_random(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    picked = torch.randperm(rows.shape[0], generator=generator)[:k].to(rows.device)
    return rows[picked].to(torch.float32 if rows.dtype != torch.float64 else torch.float64)


def _start_plus_plus(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    rows = rows.to(torch.float32 if rows.dtype != torch.float64 else torch.float64)
    first = int(torch.randint(rows.shape[0], (1,), generator=generator))
    codebook = rows.new_empty(k, rows.shape[1])
    codebook[0] = rows[first]
    distance = (rows - codebook[0]).square().sum(-1).to(torch.float64)
    for i in range(1, k):
        reach = distance.cumsum(0)
        # All rows covered: any row will do, Lloyd's re-seeding takes care of the duplicates.
        target = torch.rand((), generator=generator, dtype=torch.float64) * float(reach[-1])
        picked = int(torch.searchsorted(reach, target.to(reach.device)).clamp(max=rows.shape[0] - 1))
        codebook[i] = rows[picked]
        distance = torch.minimum(distance, (rows - codebook[i]).square().sum(-1).to(torch.float64))
    return codebook


_STARTS = {"random": _start_random, "k-means++": _start_plus_plus}

"""What the contract says, computed a second time: numpy, float64, one rounding per operation.

This file shares no code with vqfast. It is slow and plain on purpose: a loop over d in ascending order, vectorised
over rows and codes only, so that every addition, subtraction and product is one IEEE operation of numpy. Rows are
taken in chunks, which changes no value because rows do not meet.

Shapes: x [..., N, D], codebook [K, D]; or x [..., G, N, D] with codebook [G, K, D].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

CHUNK_SCORES = 1 << 20  # rows x codes held at a time: 8 MiB of float64


class Found(NamedTuple):
    distance: torch.Tensor  # [..., N] float32, float64 when an input is float64
    indices: torch.Tensor  # [..., N] int64


class Step(NamedTuple):
    """One training step's lookup, all in float64."""

    quantized: torch.Tensor  # [..., N, D] float64, NaN rows where x is not finite, zeros where masked
    indices: torch.Tensor  # [..., N] int64, -1 where masked
    mse: float  # mean over valid finite rows and D of (x - code)^2; 0 when there are none
    sums: torch.Tensor  # [G, K, D] float64
    counts: torch.Tensor  # [G, K] int64
    nonfinite: int


def as_float64(t: torch.Tensor) -> np.ndarray:
    """Every floating dtype up to float64 converts exactly."""
    return t.detach().to("cpu", torch.float64).numpy()


def _scores(rows: np.ndarray, codes: np.ndarray, metric: str) -> np.ndarray:
    """[n, D], [K, D] -> [n, K]; smaller is nearer. D ascending, one rounding per operation."""
    total = np.zeros((rows.shape[0], codes.shape[0]))
    norms = np.zeros(codes.shape[0])
    for d in range(rows.shape[1]):
        if metric == "l2":
            difference = rows[:, d, None] - codes[None, :, d]
            total = total + difference * difference
        else:
            total = total + rows[:, d, None] * codes[None, :, d]
            norms = norms + codes[:, d] * codes[:, d]
    if metric == "l2":
        return total
    if metric == "cosine":
        length = np.sqrt(norms)
        total = np.where(length > 0, total / np.where(length > 0, length, 1.0), 0.0)
    return -total


def _row_norms(rows: np.ndarray) -> np.ndarray:
    total = np.zeros(rows.shape[0])
    for d in range(rows.shape[1]):
        total = total + rows[:, d] * rows[:, d]
    return np.sqrt(total)


def _nearest_2d(rows: np.ndarray, codes: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    usable = np.isfinite(codes).all(axis=1)
    indices = np.zeros(rows.shape[0], dtype=np.int64)
    distance = np.full(rows.shape[0], np.nan)
    candidates = np.flatnonzero(usable)
    finite_rows = np.flatnonzero(np.isfinite(rows).all(axis=1))
    if not len(candidates) or not len(finite_rows):
        return distance, indices
    step = max(1, CHUNK_SCORES // len(candidates))
    for start in range(0, len(finite_rows), step):
        which = finite_rows[start : start + step]
        score = _scores(rows[which], codes[candidates], metric)
        best = score.argmin(axis=1)  # the first of equals, and candidates ascend
        indices[which] = candidates[best]
        distance[which] = score[np.arange(len(which)), best]
    if metric == "cosine":
        length = _row_norms(rows[finite_rows])
        cosine = np.where(length > 0, -distance[finite_rows] / np.where(length > 0, length, 1.0), 0.0)
        distance[finite_rows] = 1.0 - cosine
    return distance, indices


def nearest(x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2") -> Found:
    """The index of the smallest float64 score, lowest index on ties, and its distance rounded once."""
    rows, codes = as_float64(x), as_float64(codebook)
    out_dtype = np.float64 if torch.float64 in (x.dtype, codebook.dtype) else np.float32
    if codes.ndim == 2:
        distance, indices = _nearest_2d(rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]), codes, metric)
    else:
        flat = rows.reshape(math.prod(rows.shape[:-3]), *rows.shape[-3:])  # [B, G, N, D]
        pairs = [_nearest_2d(flat[b, g], codes[g], metric) for b in range(len(flat)) for g in range(len(codes))]
        distance = np.stack([p[0] for p in pairs]) if pairs else np.zeros(0)
        indices = np.stack([p[1] for p in pairs]) if pairs else np.zeros(0, dtype=np.int64)
    with np.errstate(over="ignore"):
        distance = distance.astype(out_dtype).reshape(rows.shape[:-1])
    return Found(torch.from_numpy(distance), torch.from_numpy(indices.reshape(rows.shape[:-1])))


def gather(codebook: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[K, D] or [G, K, D] and [..., N] or [..., G, N] -> rows of the codebook, zeros at -1."""
    codes = codebook.detach().cpu()
    indices = indices.cpu()
    if codes.dim() == 2:
        picked = codes[indices.clamp(min=0)]
    else:
        groups = torch.arange(codes.shape[0])[:, None]
        picked = codes[groups.expand(indices.shape), indices.clamp(min=0)]
    return torch.where((indices >= 0)[..., None], picked, torch.zeros((), dtype=codes.dtype))


def code_stats(x: torch.Tensor, indices: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, G, N, D], indices [B, G, N] -> sums [G, K, D] float64, counts [G, K] int64."""
    rows, picked = as_float64(x), indices.cpu().numpy()
    groups, dim = rows.shape[1], rows.shape[3]
    sums = np.zeros((groups, codebook_size, dim))
    counts = np.zeros((groups, codebook_size), dtype=np.int64)
    for g in range(groups):
        flat, index = rows[:, g].reshape(picked[:, g].size, dim), picked[:, g].reshape(-1)
        keep = np.isfinite(flat).all(axis=1) & (index >= 0)
        np.add.at(sums[g], index[keep], flat[keep])
        np.add.at(counts[g], index[keep], 1)
    return torch.from_numpy(sums), torch.from_numpy(counts)


def sums_bound(x: torch.Tensor, indices: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Largest error that float32 sums can have in any order of addition: n u sum|x| / (1 - n u), u = 2^-24."""
    magnitude, counts = code_stats(x.double().abs(), indices, codebook_size)
    spread = counts.double()[..., None] * 2.0**-24
    return magnitude * spread / (1 - spread)


def step(x: torch.Tensor, codebook: torch.Tensor, mask: torch.Tensor | None = None, metric: str = "l2") -> Step:
    """x [B, G, N, D], codebook [G, K, D], mask [B, N]: all that a training step's lookup produces."""
    rows = x.detach().cpu().double()
    valid = torch.ones(rows.shape[:-1], dtype=torch.bool)
    if mask is not None:
        valid = valid & mask.cpu()[:, None]
    finite = torch.isfinite(rows).all(-1)
    indices = nearest(x, codebook, metric).indices
    indices = torch.where(valid, indices, -1)
    quantized = gather(codebook.double(), indices)
    quantized[valid & ~finite] = float("nan")
    used = valid & finite
    error = (rows[used] - quantized[used]).square()
    sums, counts = code_stats(x, indices, codebook.shape[-2])
    return Step(quantized, indices, float(error.mean()) if error.numel() else 0.0, sums, counts,
                int((valid & ~finite).sum()))  # fmt: skip


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of one group's counts [K]; 1 when nothing was counted."""
    total = counts.sum()
    if total == 0:
        return 1.0
    p = counts[counts > 0].double() / total
    return float(torch.exp(-(p * p.log()).sum()))


def usage(counts: torch.Tensor) -> float:
    """Share of codes that were chosen at least once."""
    return float((counts > 0).double().mean())


class Ema(NamedTuple):
    codebook: torch.Tensor
    cluster_size: torch.Tensor
    cluster_sum: torch.Tensor


def ema_update(state: Ema, sums: torch.Tensor, counts: torch.Tensor, decay: float, eps: float = 1e-5,
               frozen: torch.Tensor | None = None) -> Ema:  # fmt: skip
    """size = decay size + (1 - decay) count, sum likewise, code = sum / size where size >= eps; all float64."""
    codebook, size, total = (t.double() for t in state)
    if counts.sum() == 0:
        return Ema(codebook, size, total)
    size = decay * size + (1 - decay) * counts.double()
    total = decay * total + (1 - decay) * sums.double()
    keep = size < eps
    if frozen is not None:
        keep = keep | frozen
    moved = torch.where(keep[..., None], codebook, total / size.clamp(min=1e-300)[..., None])
    return Ema(moved, size, total)


def residual_indices(x: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """x [N, D] float32, codebooks [Q, K, D] -> [Q, N]: what a loop of single quantizers finds, residual in float32."""
    rest, found = x.float(), []
    for codebook in codebooks:
        index = nearest(rest, codebook).indices
        rest = rest - gather(codebook.float(), index)
        found.append(index)
    return torch.stack(found)

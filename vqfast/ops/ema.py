"""ema: code statistics of a batch, and the in-place moving-average update; two ops, so that an all-reduce fits between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops import _shapes


@_border.exportable
class CodeStats(NamedTuple):
    """Result of `code_stats`: per code the sum of its rows, float32 (float64 for float64 rows), and their int64 count."""

    sums: Tensor
    counts: Tensor


def _stats_fake(x, indices, codebook_size):
    g, d = x.shape[1], x.shape[3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(g, codebook_size, d, dtype=dtype), x.new_empty(g, codebook_size, dtype=torch.int64)


def _update_fake(codebook, cluster_size, cluster_sum, sums, counts, frozen, decay, eps):
    return None


_border.define(
    "code_stats",
    "(Tensor x, Tensor indices, int codebook_size) -> (Tensor sums, Tensor counts)",
    family="ema",
    reference=reference.code_stats,
    fake=_stats_fake,
)
_border.define(
    "ema_update_",
    "(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) cluster_sum, Tensor sums, Tensor counts, Tensor? frozen,"
    " float decay, float eps) -> ()",
    family="ema",
    reference=reference.ema_update_,
    fake=_update_fake,
)


def code_stats(x: Tensor, indices: Tensor, codebook_size: int, *, backend: str | None = None) -> CodeStats:
    """Sum and count the rows of x per code.

    sums[k] = sum of x_n over rows with indices_n = k; counts[k] their number.

    **Shapes**: x [..., D], indices [...] -> sums [K, D], counts [K]. With 3 or more leading axes and indices [..., G, N] the
    groups are summed together; use the layers for separate groups.

    Args:
        x: rows, any floating dtype and strides.
        indices: integers in 0..K-1; -1 leaves a row out, and so does a NaN or Inf in it.
        codebook_size: K.
        backend: see `nearest`.

    Returns:
        CodeStats(sums float32 (float64 for float64 x), counts int64).

    Raises:
        ValueError, TypeError, IndexError: shapes, dtypes or the range of the indices do not fit.

    Gradient: none. Numerics: accumulated in float64 in a fixed order: the same bits for any thread count; counts are exact.
    """
    _shapes.check_float("x", x)
    indices = _shapes.check_indices("indices", indices)
    if tuple(indices.shape) != tuple(x.shape[:-1]) or indices.device != x.device:
        raise ValueError(
            f"x is {_shapes.describe(x)}, indices are {_shapes.describe(indices)}: indices need x's shape without the last axis,"
            " on the same device."
        )
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}.")
    rows = x.reshape(1, 1, -1, x.shape[-1]) if x.dim() != 2 else x[None, None]
    chosen = _backends.choose("ema", backend, rows)
    run = _border.call("code_stats", chosen)
    sums, counts = _shapes.with_range_checked(
        lambda: run(rows, indices.reshape(1, 1, -1), codebook_size), indices, codebook_size, chosen
    )
    return CodeStats(sums[0], counts[0])


def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    frozen: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One exponential-moving-average step of a codebook, in place (VQ-VAE paper, appendix A.1).

    size <- decay size + (1 - decay) n; sum <- decay sum + (1 - decay) s; code <- sum / size.

    **Shapes**: codebook, cluster_sum, sums [K, D] or [G, K, D]; cluster_size, counts, frozen [K] or [G, K].

    Args:
        codebook, cluster_size, cluster_sum: float32 or float64 state, contiguous, changed in place.
        sums, counts: this step's statistics (`code_stats`), all-reduced where several processes train.
        decay: share of the old state kept, 0..1.
        eps: a code whose cluster_size falls under it keeps its value.
        frozen: bool, True keeps a code's value; its size and sum still move.
        backend: see `nearest`.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, decay is outside 0..1, or eps is negative.

    Numerics: a code never becomes non-finite from finite state.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must lie in 0..1, got {decay}.")
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    for name, tensor, shape in (
        ("cluster_size", cluster_size, codebook.shape[:-1]),
        ("cluster_sum", cluster_sum, codebook.shape),
        ("sums", sums, codebook.shape),
        ("counts", counts, codebook.shape[:-1]),
    ):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} is {_shapes.describe(tensor)}, codebook is {_shapes.describe(codebook)}: {name} needs shape"
                f" {list(shape)}."
            )
    for name, tensor in (("codebook", codebook), ("cluster_size", cluster_size), ("cluster_sum", cluster_sum)):
        if tensor.dtype not in (torch.float32, torch.float64) or not tensor.is_contiguous():
            raise TypeError(f"{name} is {_shapes.describe(tensor)}; the state must be contiguous float32 or float64.")
    if counts.dtype != torch.int64 or not sums.is_floating_point():
        raise TypeError(
            f"counts are {_shapes.describe(counts)}, sums are {_shapes.describe(sums)}: counts must be int64 and sums floating, as"
            " `code_stats` gives them."
        )
    if frozen is not None and (frozen.dtype != torch.bool or frozen.shape != cluster_size.shape):
        raise TypeError(
            f"frozen is {_shapes.describe(frozen)}, cluster_size is {_shapes.describe(cluster_size)}: frozen must be bool of"
            " the same shape."
        )
    for name, tensor in (("cluster_size", cluster_size), ("cluster_sum", cluster_sum), ("sums", sums), ("counts", counts),
                         ("frozen", frozen)):  # fmt: skip
        if tensor is not None and tensor.device != codebook.device:
            raise ValueError(
                f"{name} is {_shapes.describe(tensor)}, codebook is {_shapes.describe(codebook)}: both must be on one device."
            )
    state = [t if codebook.dim() == 3 else t[None] for t in (codebook, cluster_size, cluster_sum, sums, counts)]
    frozen = frozen if frozen is None or codebook.dim() == 3 else frozen[None]
    chosen = _backends.choose("ema", backend, *state[:4])
    _border.call("ema_update_", chosen)(*(t.detach() for t in state), frozen, decay, eps)
    if not torch.compiler.is_compiling():
        # Native kernels write unseen by autograd: a codebook saved for backward must not pass for unchanged.
        torch.autograd.graph.increment_version((codebook, cluster_size, cluster_sum))

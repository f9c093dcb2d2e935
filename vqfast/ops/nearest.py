"""nearest: the exact nearest code of every row, without the N x K matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import _backends, _border, reference
from vqfast.ops import _shapes
from vqfast.ops.hints import SearchHints


@_border.exportable
class Nearest(NamedTuple):
    """Result of `nearest`: distance, float32 (float64 for float64 input), and int64 index of each row."""

    distance: Tensor
    indices: Tensor


def _fake(x, codebook, metric, order=None, basis=None, guess=None):
    float64 = torch.float64 in (x.dtype, codebook.dtype)
    shape = x.shape[:3]
    return x.new_empty(shape, dtype=torch.float64 if float64 else torch.float32), x.new_empty(shape, dtype=torch.int64)


_border.define(
    "nearest",
    "(Tensor x, Tensor codebook, int metric, Tensor? order=None, Tensor? basis=None, Tensor? guess=None)"
    " -> (Tensor distance, Tensor indices)",
    family="nearest",
    reference=reference.nearest,
    fake=_fake,
)


def search(x: Tensor, codebook: Tensor, metric: int, hints: SearchHints = SearchHints(), backend: str | None = None) -> Nearest:
    """Run the op on canonical shapes (no checks)."""
    return Nearest(*_border.call("nearest", _backends.choose("nearest", backend, x, codebook))(x, codebook, metric, *hints))


def nearest(x: Tensor, codebook: Tensor, *, metric: str = "l2", backend: str | None = None) -> Nearest:
    """Find the nearest code of every row of x, exactly.

    l2: argmin_k sum_d (x_d - c_kd)^2; dot: argmax_k sum_d x_d c_kd; cosine: argmax_k (sum_d x_d c_kd) / |c_k|.

    **Shapes**: x [..., D] and codebook [K, D]; or x [..., G, N, D] and codebook [G, K, D] (G independent groups).

    Args:
        x: rows to look up; float32, float16, bfloat16 or float64, any strides.
        codebook: the codes; its dtype may differ from x's, every value is taken exactly.
        metric: "l2", "cosine" or "dot".
        backend: "cpu", "cuda", "triton" or "reference"; by default the fastest that can (`vqfast.explain`).

    Returns:
        Nearest(distance, indices), both of x's shape without the last axis. distance is float32 (float64 for float64 input):
        l2 the squared distance, dot the negative inner product, cosine 1 - similarity. indices are int64 in 0..K-1.

    Raises:
        ValueError: shapes, devices or the metric do not fit. TypeError: a dtype is not supported.

    Gradient: none; both results are constants.

    Numerics: the index is the one whose distance, evaluated in float64 in ascending d with every operation rounded once, is
    smallest; equal distances go to the lowest index. The same on every backend, for any batch split, stride and thread count.
    A row with NaN or Inf gets index 0 and distance NaN; a code that is not finite is never chosen.

    Memory: O(N D + K D); never N x K.
    """
    code = _shapes.check_metric(metric)
    rows, groups = _shapes.canonical(x, codebook)
    distance, indices = search(rows, groups, code, backend=backend)
    shape = _shapes.leading_shape(x)
    return Nearest(distance.view(shape), indices.view(shape))

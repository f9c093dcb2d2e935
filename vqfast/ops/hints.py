"""search_hints: what is worth remembering of a codebook between searches of it. A hint may cost a search time, never a code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import _border, reference


class SearchHints(NamedTuple):
    """Hints of the border's `nearest` and `quantize`, in their order; None is no hint."""

    order: Tensor | None = None  # [G, K] int64: codes that lie close together stand together
    basis: Tensor | None = None  # [G, p, D] float32: principal directions of the codes
    guess: Tensor | None = None  # [B, G, N] int64: a likely code of each row


def _fake(codebook, metric):
    groups, codes, dim = codebook.shape
    directions = reference.hint_directions(dim)
    return codebook.new_empty(groups, codes, dtype=torch.int64), codebook.new_empty(groups, directions, dim, dtype=torch.float32)


_border.define(
    "search_hints",
    "(Tensor codebook, int metric) -> (Tensor order, Tensor basis)",
    family="hints",
    reference=reference.search_hints,
    fake=_fake,
)

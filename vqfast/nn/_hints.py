"""What a layer remembers of its codebook from search to search. It may cost a search time, never a code."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border
from vqfast.ops.hints import SearchHints

_SAMPLE = 64  # codes of a group that tell whether the codebook has moved


class HintKeeper:
    """Order and directions of a codebook that moves a little from step to step; what a layer holds.

    They save the CPU's pruned search from putting a large codebook in order at every call. They are found anew after `STEPS`
    searches of a codebook that moves, and as soon as it has jumped. Copies and pickles start without.
    """

    LEAST_CODES = 4096  # of fewer codes the order costs next to nothing
    STEPS = 32
    FAR = 0.02  # part of the codes' variance: neighbours that moved by so much may no longer be neighbours

    def __init__(self):
        self._hints = SearchHints()
        self._sample: Tensor | None = None  # some of the codes that the hints are of
        self._variance = 0.0  # of those
        self._uses = 0

    def __reduce__(self):
        return HintKeeper, ()

    def of(self, rows: Tensor, codebook: Tensor, metric: int) -> SearchHints:
        """Hints for a search of rows [B, G, N, D] in codebook [G, K, D]; none where it would make no use of them, or is traced."""
        if torch.compiler.is_compiling():  # before shapes are compared, which would tie the graph to them
            return SearchHints()
        if codebook.shape[1] < self.LEAST_CODES or not _may_prune(rows, codebook) or _border.is_traced():
            return SearchHints()
        if _backends.choose("nearest", None, rows, codebook) != "cpu" or _backends.reasons("hints", "cpu", codebook):
            return SearchHints()
        codes = codebook.detach()
        sample = codes[:, :: max(1, codes.shape[1] // _SAMPLE)]
        moved = self._moved(sample)
        if moved > self.FAR * self._variance or self._uses >= self.STEPS:
            order, basis = _border.call("search_hints", "cpu")(codes, metric)
            # For dot the search has directions of its own, in one more dimension.
            hints = SearchHints(order, None if metric == _border.METRICS["dot"] else basis)
            self._hints, self._sample, self._uses = hints, sample.clone(), 0
            self._variance = _mean_square(sample - sample.mean(1, keepdim=True))
        self._uses += moved > 0
        return self._hints

    def _moved(self, sample: Tensor) -> float:
        """Mean squared distance of these codes from those of the hints; infinite where there are none like them."""
        before = self._sample
        if before is None or sample.shape != before.shape or sample.dtype != before.dtype:
            return float("inf")
        return _mean_square(sample - before)


def _may_prune(rows: Tensor, codebook: Tensor) -> bool:
    return _backends.may_prune(rows.shape[0] * rows.shape[2], codebook.shape[1], rows.shape[3])


def _mean_square(difference: Tensor) -> float:
    return float(difference.square().nan_to_num(0.0).mean())  # codes that are not finite tell nothing

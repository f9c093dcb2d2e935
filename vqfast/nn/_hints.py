"""What a layer remembers of its codebook from search to search. It may cost a search time, never a code."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast import _backends, _border
from vqfast.ops.hints import SearchHints


class HintKeeper:
    """Hints of a codebook that moves a little from step to step, found anew every `STEPS` searches; what a layer holds.

    They save the CPU's pruned search from putting a large codebook in order at every call. Copies and pickles start without.
    """

    LEAST_CODES = 2048  # of fewer codes the order costs next to nothing
    STEPS = 32

    def __init__(self):
        self.forget()

    def __reduce__(self):
        return HintKeeper, ()

    def forget(self) -> None:
        """The codebook was replaced."""
        self._hints, self._uses = SearchHints(), self.STEPS

    def of(self, codebook: Tensor, metric: int) -> SearchHints:
        """Hints for codebook [G, K, D]; none where the search would make no use of them, or in a traced graph."""
        if codebook.shape[1] < self.LEAST_CODES or torch.compiler.is_compiling() or not _is_plain(codebook):
            return SearchHints()
        if _backends.choose("nearest", None, codebook) != "cpu":
            return SearchHints()
        stale = self._uses >= self.STEPS or self._hints.order.shape != codebook.shape[:2]
        if stale or self._hints.basis.shape[-1] != codebook.shape[-1]:
            self._hints, self._uses = SearchHints(*_border.call("search_hints", "cpu")(codebook.detach(), metric)), 0
        self._uses += 1
        return self._hints


def _is_plain(tensor: Tensor) -> bool:
    # What is kept must not outlive a transform: no fake tensor, no tensor of vmap or grad.
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

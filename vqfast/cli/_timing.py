"""Timing against plain PyTorch: the same work, the same run, medians after warm-up, and no number before the result
is right.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqfast
from vqfast import reference
from vqfast.nn import VectorQuantizerEMA


class PlainQuantizer(nn.Module):
    """The quantizer as tutorials write it: cdist, argmin, one-hot, moving averages, straight-through."""

    def __init__(
        self, dim: int, codebook_size: int, decay: float = 0.99, eps: float = 1e-5, commitment_weight: float = 0.25
    ):
        super().__init__()
        self.decay, self.eps, self.commitment_weight = decay, eps, commitment_weight
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.codebook.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat = z.reshape(-1, z.shape[-1])
        indices = torch.cdist(flat, self.codebook).argmin(dim=1)
        onehot = F.one_hot(indices, self.codebook.shape[0]).to(flat.dtype)
        quantized = self.codebook[indices].view_as(z)
        loss = self.commitment_weight * F.mse_loss(z, quantized.detach())
        if self.training:
            with torch.no_grad():
                self.cluster_size.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
                self.cluster_sum.mul_(self.decay).add_(onehot.t() @ flat, alpha=1 - self.decay)
                self.codebook.copy_(self.cluster_sum / self.cluster_size.clamp_min(self.eps)[:, None])
        p = onehot.mean(0)
        perplexity = torch.exp(-(p * (p + 1e-10).log()).sum())
        return z + (quantized - z).detach(), indices, loss, perplexity


@dataclass(frozen=True)
class StepTimes:
    """Median milliseconds of one training step of the quantizer (forward, backward, codebook update) in both
    implementations.
    """

    ours: float
    plain: float
    agreement: (
        float  # part of the rows for which plain PyTorch chose the true nearest code; ours is 1, or there is no time
    )

    @property
    def ratio(self) -> float:
        return self.plain / self.ours


def compare_steps(z: Tensor, codebook: Tensor, repeats: int = 15) -> StepTimes:
    """Times a training step of :class:`VectorQuantizerEMA` against :class:`PlainQuantizer` on the same rows and codes.

    Args:
        z: rows [N, D]. codebook: [K, D]. repeats: timed steps of each, taken in turns.

    Raises:
        RuntimeError: ours is not the true nearest code for every row; then there is nothing worth timing.
    """
    size, dim = codebook.shape
    ours, plain = VectorQuantizerEMA(dim, size).to(z.device).train(), PlainQuantizer(dim, size).to(z.device).train()
    for layer in (ours, plain):
        layer.codebook.copy_(codebook)
        layer.cluster_sum.copy_(codebook)
    agreement = _gate(ours, plain, z)

    def step(layer: nn.Module) -> None:
        x = z.detach().requires_grad_()
        out = layer(x)
        quantized, loss = (out.quantized, out.loss) if isinstance(layer, VectorQuantizerEMA) else (out[0], out[2])
        (quantized.sum() + loss).backward()

    times = in_turns({"ours": lambda: step(ours), "plain": lambda: step(plain)}, repeats, z.device)
    return StepTimes(times["ours"], times["plain"], agreement)


BURST_SECONDS = (
    0.05  # what is faster runs three times in a row per turn, so that most samples find their data in the cache
)


def in_turns(work: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each piece of work; they take turns, so a busy machine slows all of them."""
    bursts = {}
    for name, call in work.items():
        seconds = _seconds(call, device)
        if seconds < 1:  # the first call of the longer ones is warm-up enough
            seconds = _seconds(call, device)
        bursts[name] = 3 if seconds < BURST_SECONDS else 1
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            time.sleep(0.005)  # libraries bring their own thread pools; the last one's threads spin for a while
            samples[name] += [1000 * _seconds(call, device) for _ in range(bursts[name])]
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def check_codes(indices: Tensor, x: Tensor, codebook: Tensor, sample: int = 1024) -> None:
    """Compares the codes of up to `sample` evenly spaced rows of x [N, D] with the float64 oracle.

    Raises:
        RuntimeError: a code is wrong; then there is nothing worth timing.
    """
    some = torch.arange(0, len(x), max(1, len(x) // sample), device=x.device)
    truth = reference.nearest(x[some][None, None], codebook[None], 0)[1][0, 0]
    wrong = int((indices[some] != truth).sum())
    if wrong:
        raise RuntimeError(
            f"the search chose a wrong code for {wrong} of {len(some)} rows, so it is not timed; please report this "
            f"with the output of `vqfast doctor`\n{vqfast.explain('nearest', x, codebook)}"
        )


def true_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by float64 differences, lowest index on ties, a few rows at a time."""
    wide = codebook.double()
    rows = max(1, (1 << 24) // codebook.numel())
    return torch.cat([(part.double()[:, None] - wide).square().sum(-1).argmin(1) for part in z.split(rows)])


def _gate(ours: nn.Module, plain: nn.Module, z: Tensor) -> float:
    ours.eval(), plain.eval()
    with torch.no_grad():
        out, truth = ours(z), true_nearest(z, ours.codebook)
        chosen = plain(z)[1]
    ours.train(), plain.train()
    if not torch.equal(out.indices, truth) or not torch.equal(out.quantized, ours.codebook[truth]):
        wrong = int((out.indices != truth).sum())
        raise RuntimeError(
            f"the quantizer chose a wrong code for {wrong} of {len(z)} rows, so it is not timed; please report this "
            f"with the output of `vqfast doctor`\n{vqfast.explain('nearest', z, ours.codebook)}"
        )
    return float((chosen == truth).double().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

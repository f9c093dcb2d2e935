"""What the residual and the grouped layers share: which levels a training step runs, and decoding of their indices."""

from __future__ import annotations

import math
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.nn._distributed import world


def sync_seed(device: torch.device, max_size: int = 10_000) -> int:
    """A random number, the same on every process."""
    number = torch.randint(0, max_size, (), device=device)
    if world(None)[1] > 1:
        dist.all_reduce(number)
    return int(number)


class Residual(nn.Module):
    """Levels that each quantize what the ones before left over.

    Subclasses set `num_quantizers`, `project_out`, and say what a level's indices stand for.
    """

    num_quantizers: int

    def _set_dropout(self, quantize_dropout: bool, cutoff_index: int, multiple_of: int) -> None:
        require(cutoff_index >= 0, f"quantize_dropout_cutoff_index must not be negative, got {cutoff_index}.")
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = cutoff_index
        self.quantize_dropout_multiple_of = multiple_of

    def _levels(self, device: torch.device, seed: int | None, applies: bool = True) -> int:
        """How many levels this forward runs: all, or in training with dropout a random number of them."""
        if not (self.training and self.quantize_dropout and applies):
            return self.num_quantizers
        seed = sync_seed(device) if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(math.ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def _decode_levels(self, indices: tuple[Tensor, ...]) -> list[Tensor]:
        """Codes [..., D] of each level's indices [...]; index -1 gives zeros."""
        raise NotImplementedError

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of indices [B, ..., Q] as [Q, B, ..., D], zeros where -1; with dropout indices may hold the first levels only."""
        missing = self.num_quantizers - indices.shape[-1]
        require(
            missing == 0 or (missing > 0 and self.quantize_dropout),
            f"indices are {list(indices.shape)}, this layer has {self.num_quantizers} levels; fewer need quantize_dropout=True.",
        )
        return torch.stack(self._decode_levels(F.pad(indices, (0, missing), value=-1).unbind(-1)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returned for these indices."""
        total = 0.0
        for codes in self.get_codes_from_indices(indices):  # in forward's order, so that the sums are the same bits
            total = total + codes
        return self.project_out(total)

    def _stacked(self, levels: list[Tensor], missing: int = -1) -> Tensor:
        """Stack what each level gave along a last axis; levels that did not run hold `missing`."""
        absent = self.num_quantizers - len(levels)
        kind = torch.int64 if missing == -1 and absent else levels[0].dtype
        return torch.stack([*(t.to(kind) for t in levels), *[torch.full_like(levels[0], missing, dtype=kind)] * absent], -1)


class Grouped(nn.Module):
    """Residual layers `rvqs` side by side, each on its share of the channels."""

    def __init__(self, layer: type[Residual], dim: int, groups: int, channel_first: bool, **kwargs):
        super().__init__()
        require(dim % groups == 0, f"dim={dim} does not split into groups={groups}.")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, channel_first
        self.rvqs = nn.ModuleList(layer(dim=dim // groups, **kwargs) for _ in range(groups))

    @property
    def codebooks(self) -> Tensor:
        """[G, Q, K, D]."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        """The axis of channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices) -> Tensor:
        """Codes [G, Q, B, ..., D] of indices [G, B, ..., Q]."""
        return torch.stack([rvq.get_codes_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices) -> Tensor:
        """What forward returned for indices [G, B, ..., Q]."""
        outputs = [rvq.get_output_from_indices(own) for rvq, own in zip(self.rvqs, indices, strict=True)]
        return torch.cat(outputs, dim=self.split_dim)

    def _each(self, x: Tensor, per_group: list[dict] | None = None, **kwargs) -> tuple[Tensor, tuple]:
        """Run every group on its channels: (quantized joined, the groups' other results, each as a tuple of G)."""
        require(x.shape[self.split_dim] == self.dim, f"x is {list(x.shape)}; axis {self.split_dim} must hold {self.dim} channels.")
        if self.training and self.rvqs[0].quantize_dropout:
            kwargs["rand_quantize_dropout_fixed_seed"] = sync_seed(x.device)  # all groups drop the same levels
        elif self.training:
            torch.randint(10_000, (), device=x.device)  # drawn there in any case: what is drawn later stays the same
        per_group = per_group or [{}] * self.groups
        parts = x.chunk(self.groups, dim=self.split_dim)
        out = [rvq(part, **own, **kwargs) for rvq, part, own in zip(self.rvqs, parts, per_group, strict=True)]
        quantized, *rest = zip(*out, strict=True)
        return torch.cat(quantized, dim=self.split_dim), tuple(rest)

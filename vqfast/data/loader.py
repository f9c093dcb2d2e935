"""Batches that depend on (seed, step) alone, decoded ahead by threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .draws import Draws, permutation

_ORDER, _SAMPLE = 0, 1


class Dataset(Protocol):
    """What a loader needs of a data set."""

    def __len__(self) -> int: ...

    def sample(self, index: int, draws: Draws) -> Tensor:
        """One training sample, uint8 [C, H, W]; all randomness comes from `draws`."""
        ...


class Loader:
    """Shuffled batches of a data set, epoch after epoch without a seam.

    Position p = ((step * world_size) + rank) * batch_size + i of the endless sequence is item p mod n of
    epoch p div n's permutation, and the sample's own randomness is keyed by (seed, p). So a batch is a
    function of its step: a resumed run sees what an unbroken one sees, whatever the number of workers.

    Args:
        dataset: see `Dataset`.
        batch_size: samples per batch and rank.
        seed: of order and augmentation.
        start_step, stop_step: the steps that iteration runs over; stop_step None: no end.
        rank, world_size: of data-parallel training; each rank gets its own part of one global sequence.
        workers: threads that decode ahead (Pillow works without Python's lock); 0: in the caller.
        prefetch: batches that each worker is ahead.

    Raises:
        ValueError: an empty data set or a setting out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
    ):
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        if batch_size < 1 or start_step < 0 or workers < 0 or prefetch < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} and prefetch {prefetch} must be at least 1, start_step "
                f"{start_step} and workers {workers} at least 0, and rank {rank} in [0, world_size "
                f"{world_size})"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.start_step, self.stop_step = start_step, stop_step
        self.rank, self.world_size = rank, world_size
        self.workers, self.prefetch = workers, prefetch
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> Tensor:
        """The batch of one step: uint8 [batch_size, C, H, W]."""
        first = (step * self.world_size + self.rank) * self.batch_size
        samples = [self._sample(position) for position in range(first, first + self.batch_size)]
        if len({sample.shape for sample in samples}) > 1:
            shapes = sorted({tuple(sample.shape) for sample in samples})
            raise ValueError(f"the samples of one batch have different shapes, {shapes[0]} and {shapes[1]}")
        return torch.stack(samples)

    def _sample(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.dataset))
        return self.dataset.sample(int(self._order(epoch)[place]), Draws(self.seed, _SAMPLE, position))

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(len(self.dataset), self.seed, _ORDER, epoch)
            # Workers may straddle an epoch's end, so the last few stay; a lost race computes the same order
            # twice.
            self._orders = {**dict(list(self._orders.items())[-3:]), epoch: order}
        return order

    def __iter__(self) -> Iterator[Tensor]:
        """The batches from start_step on. Leaving the loop early ends the workers."""
        steps = (
            iter(range(self.start_step, self.stop_step))
            if self.stop_step is not None
            else itertools.count(self.start_step)
        )
        if not self.workers:
            for step in steps:
                yield self.batch(step)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vqfast-data")
        ahead: deque[Future] = deque()
        try:
            for step in steps:
                ahead.append(pool.submit(self.batch, step))
                if len(ahead) > self.workers * self.prefetch:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

"""Where this process computes and which of how many it is. Plain torch.distributed; torchrun starts the processes."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vqfast.train.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process' number, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True in every process when the flag is set in at least one."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The same-sized tensors of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        value = value.to(self.device)
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(parts, value)
        return parts

    def parallel(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with averaged gradients. Buffers are left alone: codebooks are equal everywhere by their own
        all-reduce, and a broadcast from rank 0 would hide it if they were not."""
        wrapper = torch.nn.parallel.DistributedDataParallel
        # The option got a new name in torch 2.13, which warns about the old one.
        option = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(wrapper).parameters
            else "broadcast_buffers"
        )
        return wrapper(model, device_ids=[self.device.index] if self.device.type == "cuda" else None, **{option: False})

    @staticmethod
    def release() -> None:
        """Frees a data-parallel wrapper that nobody holds any more, while the process group still lives.

        Its C++ half holds the group. Were it the last one to do so, the group's threads would be joined with
        Python's lock held, and a thread that just then wants the lock to free a tensor would wait for ever.
        """
        gc.collect()


@contextlib.contextmanager
def start_ranks(device: str) -> Iterator[Ranks]:
    """Joins the process group when torchrun started this process, and leaves it at the end.

    Args:
        device: auto, cpu, cuda or cuda:N. Under torchrun, cuda means the GPU of this process' local rank.

    Raises:
        ConfigError: the device does not exist here.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)) if launched else 0)
    if not launched:
        yield Ranks(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; auto is a GPU when there is one.

    Raises:
        ConfigError: it is none of cpu, cuda and cuda:N, or PyTorch sees no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name, re.ASCII)
    if match is None:
        raise ConfigError(f"there is no device {name!r} that vqfast runs on; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but PyTorch sees no GPU here; use --device cpu")
    index = local_rank if match[1] is None else int(match[1])
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there is no cuda:{index}: PyTorch sees {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device

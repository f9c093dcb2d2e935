"""What every kernel file here needs from the host side: launching on the right device, grid sizes, Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import os

import torch


def interpreted() -> bool:
    """True when Triton runs kernels on the CPU, one program after the other (TRITON_INTERPRET=1), for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: torch.Tensor):
    """Context in which a launch goes to `tensor`'s device, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache
def _cuda_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return properties.multi_processor_count, shared


def processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors (compute units) of the device; 2 in the interpreter, so that loops over a grid are taken there."""
    return _cuda_facts(tensor.device.index or 0)[0] if tensor.is_cuda else 2


def shared_memory(tensor: torch.Tensor) -> int:
    """Bytes of shared memory that one program may take; 227 KiB (Hopper) in the interpreter."""
    return _cuda_facts(tensor.device.index or 0)[1] if tensor.is_cuda else 227 * 1024


def warps(threads: int) -> int:
    """Warps (wavefronts) of a program of so many threads."""
    return threads // (64 if torch.version.hip else 32)


MOST_GROUPS = 65_535  # where the second and third axes of a grid end


def group_parts(groups: int) -> list[slice]:
    """Groups that one launch takes, more of which are launched one part after the other."""
    return [slice(first, min(groups, first + MOST_GROUPS)) for first in range(0, groups, MOST_GROUPS)]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()

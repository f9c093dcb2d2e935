"""Peak extra memory of one search, measured in a process of its own.

python bench/memory.py METHOD DATA N K        prints MiB above what was resident before the call
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import Shape

from vqfast.cli._peers import searches


def peak_mib(method: str, shape: Shape, threads: int | None = None) -> float:
    """MiB by which one search raises the process's high-water mark (VmHWM), after a small one has warmed it up."""
    return from_own_process([__file__, method, shape.data, str(shape.rows), str(shape.codes)], threads)


def from_own_process(arguments: list[str], threads: int | None = None) -> float:
    """The number that a Python script prints last."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} measured nothing: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def limit_memory(gib: int) -> None:
    """Refuses this process more address space than it has now plus so much: an allocation then fails, instead of the machine."""
    limit = int(status("VmSize") * 2**20) + gib * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this needs Linux")


def raised_by(call: Callable[[], object]) -> float:
    """MiB by which a call raises this process's high-water mark above what was resident before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    except OSError:
        pass  # then it can only read too high
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def main(method: str, data: str, rows: int, codes: int) -> None:
    x, codebook = Shape(data, rows, codes).load()
    searches(x[:64], codebook[:64].contiguous(), compiled=False)[method]()
    print(raised_by(searches(x, codebook, compiled=False)[method]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

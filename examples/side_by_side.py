"""What the migrations share: time, memory and codes of the same call before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians after a warm-up; the calls take turns, so that a busy machine slows all of them."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def extra_mebibytes(call: Callable[[], object]) -> float:
    """By how much one call raises the process's high-water mark of memory (Linux; NaN elsewhere).

    What the allocator kept from earlier calls and uses again does not show.
    """
    mark = Path("/proc/self/clear_refs")
    try:
        call()
        mark.write_text("5")  # the mark falls to what is resident now
        before = _status("VmRSS")
        call()
        return max(0.0, _status("VmHWM") - before)
    except OSError:
        return float("nan")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def report(old: Callable[[], torch.Tensor], new: Callable[[], torch.Tensor], what: str, repeats: int) -> None:
    """Print time and memory of both, and how many codes agree; end the process with an error where more than rounding differs.

    Two codes may be as near as float32 can tell; there the exact search and a rounded one may differ. More than one in a thousand
    would mean that the two do not do the same.
    """
    codes, again = old(), new()
    equal = (codes == again).double().mean().item()
    spent = milliseconds({"old": old, "new": new}, repeats)
    memory = {"old": extra_mebibytes(old), "new": extra_mebibytes(new)}
    print(f"{what}: {tuple(codes.shape)} codes, {torch.get_num_threads()} threads")
    for name in ("old", "new"):
        print(f"  {name}  {spent[name]:9.1f} ms  {memory[name]:8.1f} MiB extra")
    print(f"  equal codes: {100 * equal:.3f} %, time ratio {spent['old'] / spent['new']:.2f}")
    if equal < 0.999:
        raise SystemExit("the codes differ by more than rounding explains")

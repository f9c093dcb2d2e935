"""What the benchmark files share."""

from __future__ import annotations

import pytest
import torch


def over(shapes, methods):
    """Parametrizes over shapes and methods, shapes by name."""
    shape = pytest.mark.parametrize("shape", shapes, ids=lambda shape: shape.name)
    method = pytest.mark.parametrize("method", methods)
    return lambda function: shape(method(function))


def timed(benchmark, call, shape, rounds: int = 7) -> None:
    """Median of `rounds` after a warm-up, in one table per shape. A group's methods run one after the other: for ratios
    that survive a busy machine, see report.py, which takes turns.
    """
    benchmark.group = f"{benchmark.group or ''} {shape.name}".strip()
    benchmark.extra_info.update(shape=shape.name, threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)

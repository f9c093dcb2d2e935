"""Checks and the canonical shapes of all ops: x [B, G, N, D], codebook [G, K, D], indices [B, G, N], mask [B, N]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from vqfast._border import METRICS

T = TypeVar("T")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; call .to_dense() first.")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {describe(tensor)}; vqfast takes float64, float32, float16 or bfloat16. Convert it with .float()."
        )


def check_metric(metric: str) -> int:
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not known; use one of {', '.join(METRICS)}.")
    return METRICS[metric]


def check_codebook(codebook: Tensor, other: Tensor, named: str) -> Tensor:
    """[K, D] or [G, K, D] -> [G, K, D]; `named`, as "x is", leads to the other tensor of the call in a message."""
    check_float("codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{_both(other, named, codebook)}: it must be [K, D] or, with groups, [G, K, D]. Reshape it.")
    if codebook.numel() == 0:
        raise ValueError(
            f"{_both(other, named, codebook)}: it needs at least one group, one code and one dimension. Pass a codebook"
            " that is not empty."
        )
    return codebook if codebook.dim() == 3 else codebook.view(1, *codebook.shape)


def _both(x: Tensor, named: str, codebook: Tensor) -> str:
    # Called by what raises: to describe two tensors takes longer than to search for a row or two.
    return f"{named} {describe(x)}, codebook is {describe(codebook)}"


def canonical(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Check x against codebook and bring both to [B, G, N, D] and [G, K, D], without a copy where strides allow."""
    check_float("x", x)
    grouped = check_codebook(codebook, x, "x is")
    if x.dim() < 1 or x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"{_both(x, 'x is', codebook)}: the last axis of both must have the same length. For channels-first data move the"
            " channels last (x.movedim(1, -1)) or use a layer with channel_dim=1."
        )
    if x.device != codebook.device:
        raise ValueError(f"{_both(x, 'x is', codebook)}: both must be on one device. Move one of them with .to(device).")
    if codebook.dim() == 3:
        if x.dim() < 3 or x.shape[-3] != codebook.shape[0]:
            raise ValueError(
                f"{_both(x, 'x is', codebook)}: a grouped codebook [G, K, D] needs x of shape [..., G, N, D] with the same"
                " G. Use x.unflatten(-1, (G, D)).movedim(-2, -3) to split channels into groups."
            )
        return collapse_leading(x, 3), grouped
    return _rows(x), grouped


def collapse_leading(x: Tensor, kept: int) -> Tensor:
    """All axes but the last `kept` as one: [..., G, N, D] -> [B, G, N, D] with kept = 3."""
    return x[None] if x.dim() == kept else x.flatten(0, -kept - 1)


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [B, 1, N, D]; keeps the first axis apart, so that a channels-first image needs no copy."""
    if x.dim() <= 2:
        return x.view(1, 1, *(1,) * (2 - x.dim()), *x.shape)
    if x.dim() > 3:
        x = x.flatten(1, -2) if _flattens(x) else x.flatten(0, -2)[None]
    return x[:, None]


def _flattens(x: Tensor) -> bool:
    """True where axes 1..-2 collapse into one without a copy."""
    return all(
        x.stride(i) == x.stride(i + 1) * x.shape[i + 1] or x.shape[i] == 1 for i in range(1, x.dim() - 2)
    ) or not all(x.shape)


def leading_shape(x: Tensor) -> tuple[int, ...]:
    """Shape of the indices of x: all axes but the last."""
    return tuple(x.shape[:-1])


def check_indices(name: str, indices: Tensor) -> Tensor:
    """Any integer dtype but uint64 -> int64."""
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        got = describe(indices) if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name} must be a tensor of integers (int64 preferred), got {got}.")
    if indices.dtype == torch.uint64:  # its largest values would turn negative, and -1 means a masked position
        raise TypeError(f"{name} must hold integers that fit int64, got {describe(indices)}; convert them by .to(torch.int64).")
    return indices.to(torch.int64)


def check_range(indices: Tensor, codebook_size: int) -> None:
    """Raise IndexError for values outside -1..K-1."""
    if not indices.numel():
        return
    low, high = (int(v) for v in indices.aminmax())
    if low < -1 or high >= codebook_size:
        raise IndexError(
            f"indices hold values from {low} to {high}, but the codebook has {codebook_size} codes; an index must lie in"
            f" 0..{codebook_size - 1}, or be -1 for a masked position."
        )


def with_range_checked(run: Callable[[], T], indices: Tensor, codebook_size: int, backend: str, validate: bool | None = None) -> T:
    """run(), which may be asked twice, or IndexError for values outside -1..K-1: always on the CPU, where `validate` changes nothing on the
    backends that look at each index themselves; elsewhere when `validate` asks (it waits for the device). In a graph nothing is checked.
    """
    if torch.compiler.is_compiling():
        return run()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # there an op's own error would not come through
    if indices.device.type == "cpu" and backend in ("cpu", "reference") and not transformed:
        with contextlib.suppress(RuntimeError):
            return run()
        check_range(indices, codebook_size)
        return run()  # another reason: it is given again
    if validate if validate is not None else indices.device.type == "cpu":
        # Indices that a transform batches cannot be read.
        with contextlib.suppress(RuntimeError) if transformed else contextlib.nullcontext():
            check_range(indices, codebook_size)
    return run()

"""Which backend runs an op and, in words, why the others do not. The only module that reads `VQFAST_*` at run time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from vqfast import _border
from vqfast._border import BACKENDS

CPU_LEVELS = ("scalar", "avx2", "avx512", "avx512vnni")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_local = threading.local()


class BackendError(RuntimeError):
    """The backend that was asked for cannot run an op; the message says why."""


# ---- native libraries ------------------------------------------------------------------------------------------------------


@functools.cache
def _load(library: str) -> str:
    """Load one compiled library; returns '' or the reason, in words, why it is not there."""
    path = Path(__file__).with_name(f"{library}.so")
    if not path.exists():
        return f"this installation was built without {library} (no compiler at build time, or VQFAST_BUILD=none)"
    if library == "_C_cuda" and torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    if library == "_C_cpu":
        return _set_cpu_level(path)
    return ""


def _set_cpu_level(path: Path) -> str:
    forced = os.environ.get("VQFAST_CPU_LEVEL", "")
    if forced and forced not in CPU_LEVELS:
        raise ValueError(f"VQFAST_CPU_LEVEL={forced!r} is not known; use one of {', '.join(CPU_LEVELS)}, or unset it.")
    library = ctypes.CDLL(str(path))
    best = library.vqfast_cpu_level_supported()
    wanted = CPU_LEVELS.index(forced) if forced else best
    if wanted > best:
        raise ValueError(f"VQFAST_CPU_LEVEL={forced} asks for more than this processor has; it supports {CPU_LEVELS[best]}.")
    library.vqfast_cpu_level_set(wanted)
    return ""


def load_native() -> None:
    """Load the libraries that exist; called once, by `import vqfast`."""
    with contextlib.suppress(ValueError):  # a wrong VQFAST_CPU_LEVEL: the first op says so, and every command
        if os.environ.get("VQFAST_BACKEND") != "reference" and _load("_C_cpu"):
            warnings.warn(
                "vqfast runs on its slow reference backend: " + _load("_C_cpu") + ". Install g++ and reinstall vqfast for the"
                " fast CPU kernels.",
                stacklevel=3,
            )
    _load("_C_cuda")


def check_environment() -> None:
    """Raises ValueError when VQFAST_BACKEND or VQFAST_CPU_LEVEL has a value that no op could heed."""
    _forced()
    _load("_C_cpu")


def cpu_level() -> str | None:
    """SIMD level of the native CPU kernels (one of CPU_LEVELS), or None without them."""
    if _load("_C_cpu"):
        return None
    return CPU_LEVELS[_cpu_library().vqfast_cpu_level()]


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(__file__).with_name("_C_cpu.so")))


def may_prune(rows: int, codes: int, dim: int) -> bool:
    """Whether the native CPU search may skip codes in panels for so many rows and codes of a group, and so has use for hints."""
    if _load("_C_cpu"):
        return False
    return bool(_cpu_library().vqfast_cpu_may_prune(*map(ctypes.c_int64, (rows, codes, dim))))


ROADS = ("auto", "dense", "panels", "few", "bytes")


class SearchCounts(NamedTuple):
    """What the native CPU search did, from `search_counts`. Counts are sums over the rows.

    road: "dense", "bytes" (dense, in bytes first), "panels" or "few", the one that was taken. panels_of_codebook: panels of 32 codes that the codebook was cut into.
    groups, panels: visited (0 on the dense roads, which visits all). evaluations: codes compared in all coordinates.
    candidates: codes settled by the contract's formula. searched: distinct codes of the plans; always: codes beside them that every
    row tries by the formula.
    """

    road: str
    rows: int
    panels_of_codebook: int
    groups: int
    panels: int
    evaluations: int
    candidates: int
    searched: int
    always: int
    distance: torch.Tensor
    indices: torch.Tensor


def search_counts(
    x: torch.Tensor, codebook: torch.Tensor, metric: str = "l2", road: str = "auto", order: torch.Tensor | None = None
) -> SearchCounts:
    """Search by the native CPU kernels and count what they do; for tests and reports.

    Args:
        x: [N, D] float32, contiguous. codebook: [K, D] likewise.
        metric: "l2", "cosine" or "dot".
        order: [K] int64, the hint of that name.
        road: "auto" as `nearest` would choose, or the one to take ("panels" and "bytes" fall back to dense where there are none).

    Raises:
        RuntimeError: there are no native kernels. ValueError: a tensor is not as said above.
    """
    missing = _load("_C_cpu")
    if missing:
        raise RuntimeError(f"the search cannot be counted: {missing}.")
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or not tensor.is_contiguous() or tensor.shape[1] != x.shape[1]:
            raise ValueError(f"{name} must be contiguous float32 [rows, D] on the CPU, got {list(tensor.shape)} {tensor.dtype}.")
    distance, indices = torch.empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    if order is not None and (order.dtype != torch.int64 or order.shape != (len(codebook),) or not order.is_contiguous()):
        raise ValueError(f"order must be contiguous int64 [{len(codebook)}], got {list(order.shape)} {order.dtype}.")
    hint = ctypes.c_void_p(None if order is None else order.data_ptr())
    out = (ctypes.c_int64 * 9)()
    sizes = [ctypes.c_int64(size) for size in (len(x), len(codebook), x.shape[1])]
    address = [ctypes.c_void_p(t.data_ptr()) for t in (x, codebook, distance, indices)]
    library = _cpu_library()
    library.vqfast_cpu_search_counts.restype = None
    library.vqfast_cpu_search_counts(
        address[0], sizes[0], address[1], *sizes[1:], _border.METRICS[metric], ROADS.index(road), hint, *address[2:], out
    )
    return SearchCounts(ROADS[out[0]], *out[1:], distance, indices)


# ---- reasons ---------------------------------------------------------------------------------------------------------------


def reasons(family: str, backend: str, *tensors: torch.Tensor) -> list[str]:
    """Why `backend` cannot run an op of `family` on these tensors; empty when it can."""
    return list(_reasons(family, backend, *_metadata(tensors)))


def _metadata(tensors) -> tuple[str, tuple[torch.dtype, ...]]:
    return tensors[0].device.type, tuple(t.dtype for t in tensors if t.is_floating_point())


@functools.cache
def _reasons(family: str, backend: str, device: str, dtypes: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    if backend == "reference":
        return ()
    found = []
    if backend in ("cpu", "cuda"):
        missing = _load(f"_C_{backend}")
        found += [missing or _unless(_border.implemented(family, backend), f"{family} has no {backend} kernel")]
    if backend == "cpu":
        found += [_unless(device == "cpu", f"its tensors live on {device}, the cpu backend takes cpu tensors")]
    if backend == "cuda":
        found += [_unless(device == "cuda", f"its tensors live on {device}, the cuda backend takes cuda tensors")]
    if backend == "triton":
        found += _triton_reasons(family, device)
    if backend in ("cuda", "triton") and device == "cuda":
        found += [_old_gpu()]
    found += [_unless(d in _DTYPES, f"{d} runs on the reference backend only") for d in dtypes]
    return tuple(reason for reason in found if reason)


def _triton_reasons(family: str, device: str) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (pip install triton)"]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        _unless(_has_triton_kernel(family), f"{family} has no Triton kernel"),
        _unless(device == "cuda" or interpreted, f"its tensors live on {device}, Triton takes cuda tensors"),
    ]


def _old_gpu() -> str:
    # One older GPU in sight is one too many: the choice knows that a tensor lives on a GPU, not on which.
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        if major < 8:
            return (
                f"GPU {i} ({torch.cuda.get_device_name(i)}) has compute capability {major}.{minor}, the GPU kernels need 8.0"
                " (CUDA_VISIBLE_DEVICES hides it)"
            )
    return ""


def _has_triton_kernel(family: str) -> bool:
    try:
        return importlib.util.find_spec(f"vqfast.kernels.{family}") is not None
    except ModuleNotFoundError:  # the kernels folder itself is not installed
        return False


def _unless(condition: bool, reason: str) -> str:
    return "" if condition else reason


# ---- choice ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_backend(backend: str):
    """Run every vqfast op inside the `with` block on `backend` (this thread only).

    Raises:
        ValueError: `backend` is not one of cpu, cuda, triton, reference.
    """
    _check_name(backend, "use_backend")
    previous = getattr(_local, "forced", None)
    _local.forced = backend
    try:
        yield
    finally:
        _local.forced = previous


def _forced() -> str | None:
    backend = getattr(_local, "forced", None) or os.environ.get("VQFAST_BACKEND") or "auto"
    if backend == "auto":
        return None
    _check_name(backend, "VQFAST_BACKEND")
    return backend


def runs_on_cpu(family: str, *tensors: torch.Tensor) -> bool:
    """Whether the native CPU backend runs an op of `family` that has no other: it can, and no other backend is asked for."""
    return _forced() in (None, "cpu") and not reasons(family, "cpu", *tensors)


def _check_name(backend: str, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: backend {backend!r} is not known; use one of {', '.join(BACKENDS)}.")


def choose(family: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """The backend that runs an op of `family`: the forced one, or the fastest that can.

    Raises:
        ValueError: the name is not known.
        BackendError: a forced backend cannot run; the message says why.
    """
    return _choose(family, backend, *_metadata(tensors))


def _choose(family: str, backend: str | None, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    if backend is not None:
        _check_name(backend, "backend=")
    forced = backend or _forced()
    if forced is not None:
        found = _reasons(family, forced, device, dtypes)
        if found:
            raise BackendError(
                f"{family} cannot run on backend {forced!r}: {'; '.join(found)}. Choose another backend, or leave the"
                " choice to vqfast."
            )
        return forced
    for candidate in ("cuda", "triton") if device == "cuda" else ("cpu",):
        if not _reasons(family, candidate, device, dtypes):
            return candidate
    return "reference"


# A function of metadata alone, so that a compiled or exported graph holds the choice as a constant. The decorator
# torch.compiler.assume_constant_result sets this same mark, but imports torch._dynamo and with it Triton.
_choose._dynamo_marked_constant = True


def explain(family: str, *tensors: torch.Tensor) -> str:
    """Say in words which backend would run an op of `family` on these tensors, and why each other one would not.

    Example:
        >>> print(vqfast.explain("nearest", x, codebook))

    Raises:
        ValueError: the family is not known, or no tensor is given.
    """
    if family not in _border.families():
        raise ValueError(f"{family!r} is not an op family; use one of {', '.join(_border.families())}.")
    if not tensors:
        raise ValueError(f"explain({family!r}) needs the op's tensors: what runs depends on their device and dtypes.")
    try:
        lines = [f"{family}: runs on {choose(family, None, *tensors)}"]
    except BackendError as error:
        lines = [f"{family}: {error}"]
    for backend in BACKENDS:
        found = reasons(family, backend, *tensors)
        lines.append(f"  {backend:<10}" + ("can run" if not found else "cannot: " + "; ".join(found)))
    if _forced():
        lines.append(f"  (forced to {_forced()} by use_backend() or VQFAST_BACKEND)")
    return "\n".join(lines)

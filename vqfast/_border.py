"""The one border between Python and the kernels: every op, once per backend.

An op `nearest` exists as `torch.ops.vqfast.nearest_cpu`, `nearest_cuda`, `nearest_triton` and `nearest_reference`, all with one
schema, one fake and one gradient. The schemas are defined here, in Python; compiled libraries only register implementations of
their own names, so that loading two copies of one is harmless and a machine without a compiler still has every op name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")
METRICS = {"l2": 0, "cosine": 1, "dot": 2}

_library = torch.library.Library("vqfast", "DEF")
_ops: dict[str, dict[str, Callable]] = {}
_families: dict[str, list[str]] = {}
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")  # autograd's is_grads_batched, which is no transform of torch.func


def exportable(result: type) -> type:
    """A public named tuple, which programs of torch.export may then return and still be saved."""
    torch.utils._pytree._register_namedtuple(result, serialized_type_name=f"{result.__module__}.{result.__qualname__}")
    return result


def is_traced() -> bool:
    """Whether what runs now may become part of a graph or of a transform (compile, export, vmap, grad, dual numbers): then no value may be looked at,
    and nothing that is kept would be real.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or torch.autograd.forward_ad._current_level >= 0
    )


def op_name(op: str, backend: str) -> str:
    """`nearest`, `cpu` -> `nearest_cpu`; the trailing underscore of an in-place op stays last: `ema_update_cpu_`."""
    return f"{op.removesuffix('_')}_{backend}" + ("_" if op.endswith("_") else "")


def define(
    op: str,
    schema: str,
    *,
    family: str,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `op` for all four backends.

    Args:
        op: op name without the backend; ends with `_` when it works in place.
        schema: everything after the name, for example `(Tensor x) -> Tensor`.
        family: the word that names the files of this op in every folder; `vqfast.kernels.<family>` holds its Triton entry.
        reference: what the op means, in plain torch.
        fake: shapes, dtypes and strides of the results.
        setup_context, backward: the gradient; without them the outputs carry none.
    """
    _ops[op] = {}
    _families.setdefault(family, []).append(op)
    for backend in BACKENDS:
        name = op_name(op, backend)
        qualified = f"vqfast::{name}"
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        if backward:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        elif not op.endswith("_"):
            # What it makes is a constant: autograd steps aside, which costs no time, unlike a gradient of nothing.
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        if backend == "reference":
            _implement(name, reference, "CompositeExplicitAutograd")
        elif backend == "triton":
            _implement(name, _triton_entry(family, name), "CompositeExplicitAutograd")
        _ops[op][backend] = getattr(torch.ops.vqfast, name).default


def implement(op: str, backend: str, function: Callable) -> None:
    """Give cpu or cuda an implementation in Python, for an op that its native library leaves to torch's own ops."""
    _implement(op_name(op, backend), function, backend.upper())


def _implement(name: str, function: Callable, key: str) -> None:
    # Torch's own ops inside must not be recorded either: an op has the gradient that `define` gives it, or none.
    def unrecorded(*args):
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            return function(*args)

    _library.impl(name, unrecorded, key)


def call(op: str, backend: str) -> Callable:
    """The op of one backend, ready to be called with the schema's arguments."""
    return _ops[op][backend]


def bound_once(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Class decorator. Torch binds the arguments of a Function that has a setup_context by a signature that it would work out anew at
    every call, which costs as much as a search of a few rows.
    """
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def families() -> list[str]:
    """Op families defined so far."""
    return sorted(_families)


def implemented(family: str, backend: str) -> bool:
    """True where a loaded library registered every op of `family` for `backend` (cpu or cuda)."""
    names = [f"vqfast::{op_name(op, backend)}" for op in _families[family]]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, backend.upper()) for name in names)


def _triton_entry(family: str, name: str) -> Callable:
    def entry(*args):
        # Imported at the first call: importing vqfast must not import Triton.
        module = importlib.import_module(f"vqfast.kernels.{family}")
        return getattr(module, name)(*args)

    return entry

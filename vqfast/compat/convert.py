"""convert: put the exact search and the update without N x K into the quantizers of a model that other libraries made."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vqfast.compat._known import KNOWN, REFUSED, Seam


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        replaced: path of a quantizer in the model -> its class.
        skipped: path of a quantizer that was left as it is -> why.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give every quantizer its own methods back. Parameters, buffers and hooks are the same objects throughout."""
        for module in self._changed:
            module.__class__ = type(module)._vqfast_original
        self._changed.clear()

    def __str__(self) -> str:
        lines = _lines("replaced", self.replaced) + _lines("left as it is", self.skipped)
        return "\n".join(lines) or "no quantizer that vqfast knows; nothing was changed"


def _lines(what: str, paths: dict[str, str]) -> list[str]:
    """One line for all paths of one class, or of one reason."""
    groups: dict[str, list[str]] = {}
    for path, text in paths.items():
        groups.setdefault(text, []).append(path or "(the model itself)")
    return [
        f"{what}: {found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {text}" for text, found in groups.items()
    ]


def convert(model: nn.Module) -> Conversion:
    """Swap the search, and the update in training, inside the quantizers of a model, in place.

    Known are the quantizers of vector_quantize_pytorch, transformers (Encodec, Mimi, Dac, Xcodec, HiggsAudioV2Tokenizer, Chameleon,
    Janus, Emu3, GLM-Image), diffusers' VQModel, taming-transformers, encodec, audiocraft, moshi, descript-audio-codec,
    rosinality/vq-vae-2-pytorch, VAR, LlamaGen and 1d-tokenizer, by the names of their classes; anything else is left alone.
    A quantizer keeps its parameters, buffers, hooks, state dict and outputs; its codes are the nearest ones in exact arithmetic,
    and it makes no N x K matrix.

    A class may have changed since this was written, or be another of the same name. So each quantizer is tried first, as a copy
    with random values, in evaluation and training: outputs, gradients and new state must agree, or it is skipped with that reason.
    The check needs memory for that copy. Random state of the caller is left as it was. Quantizers that reduce over processes do so in
    the trial: call this before the process group exists, or on every process.

    Args:
        model: any module; converted quantizers inside are skipped, so that calling this again is harmless.

    Returns:
        Conversion: `print` it for what was replaced and what was not and why; `.revert()` undoes it.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> report = vqfast.convert(EncodecModel.from_pretrained(path))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    report = Conversion()
    for path, module in list(model.named_modules()):
        base, found = _look_up(type(module))
        if found is None or any(module is changed for changed in report._changed):
            continue
        reason = found if isinstance(found, str) else _why_not(module, base, found)
        if reason:
            report.skipped[path] = reason
            continue
        report._changed += _swap(module, found)
        report.replaced[path] = _full_name(base)
    return report


# ---- recognising -----------------------------------------------------------------------------------------------------------


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _look_up(cls: type) -> tuple[type, Seam | str | None]:
    """A class, or the first known one that it inherits from, with its seam or the reason why there is none; None: not known."""
    for base in cls.__mro__:
        if "_vqfast_original" in vars(base):
            return base, "it is converted already"
        if base.__module__.startswith("vqfast."):
            return cls, None  # a face of ours
        name = _full_name(base)
        for known in (KNOWN, REFUSED):
            # A copy of a library inside another package keeps the end of the name.
            key = next((key for key in known if name == key or name.endswith("." + key)), None)
            if key is not None:
                return base, known[key]
    return cls, None


def _why_not(module: nn.Module, base: type, seam: Seam) -> str:
    try:
        reason = seam.refuse(module)
        for name in vars(seam.methods[""]):
            if getattr(type(module), name, None) is not getattr(base, name, None) and not name.startswith("__"):
                reason = reason or f"{type(module).__name__} has a {name} of its own"
        for path, methods in seam.methods.items():
            reason = reason or _does_not_fit(module.get_submodule(path), methods)
    except AttributeError as error:
        return f"it is not the class that vqfast knows by this name: {error}"
    return reason or _disagreement(module, seam)


def _does_not_fit(module: nn.Module, methods: type) -> str:
    """Why these methods cannot stand in front of the module's own, or ""."""
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        return "accelerate's hooks manage its weights; convert before dispatching the model"
    for name, ours in vars(methods).items():
        if name in vars(module):
            return f"its {name} is wrapped on the instance; convert before wrapping"
        theirs = getattr(type(module), name, None)
        if theirs is None or not inspect.isfunction(ours):
            continue
        ours, theirs = (list(inspect.signature(function).parameters.values()) for function in (ours, theirs))
        if any(p.kind is p.VAR_POSITIONAL for p in ours):
            continue
        unknown = [p.name for p in theirs if p.default is not p.empty and p.name not in {o.name for o in ours}]
        if unknown:
            return f"its {name} takes {', '.join(unknown)}, which vqfast does not know"
    return ""


# ---- trying ----------------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # gradients are part of the trial
def _disagreement(module: nn.Module, seam: Seam) -> str:
    """How the converted module differs from the module as it is, on a copy with random values; "" when it does not."""
    try:
        twin = _copy_without_hooks(module)
    except Exception as error:
        return f"it cannot be copied to be tried first: {error}"
    devices = sorted({t.device.index for t in (*twin.parameters(), *twin.buffers()) if t.is_cuda})
    for training in (False, True):
        with torch.random.fork_rng(devices), torch.enable_grad():
            theirs, error = _try(twin, seam, False, training, devices)
            ours, own_error = _try(twin, seam, True, training, devices)
        if error and own_error:
            if not training:
                return f"it fails on a small input, converted or not: {error}"
        elif error or own_error:
            return f"in {_mode(training)} only {'it' if error else 'the conversion'} fails on a small input: {error or own_error}"
        elif not _same(ours, theirs):
            return f"its results in {_mode(training)} are not those of the class that vqfast knows by this name"
    return ""


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    """A deep copy whose use nobody notices. Old-style weight_norm keeps its product as an attribute, which deepcopy refuses."""
    products = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
    twin = copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in products})
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return twin


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _try(twin: nn.Module, seam: Seam, converted: bool, training: bool, devices: list[int]) -> tuple[list[Tensor], str]:
    """(outputs, gradients and state of one call on a copy with random values, what went wrong)."""
    module = copy.deepcopy(twin).train(training)
    # Not torch.manual_seed, which would also seed devices whose generators are not given back afterwards.
    for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
        generator.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            # Positive values suit codes, averages and sizes alike; half precision would leave ties.
            tensor.data = tensor.data.float().uniform_(0.5, 1.5)
    if converted:
        _swap(module, seam)
    try:
        results = [leaf for leaf in tree_leaves(seam.call(module)) if leaf is not None]
        tensors = [leaf for leaf in results if isinstance(leaf, Tensor) and leaf.requires_grad]
        inputs = [p for p in (*module.parameters(), *(t for t in tensors if t.is_leaf)) if p.requires_grad]
        gradients = []
        if tensors and inputs:
            # Not squares, whose gradient along a sphere is zero.
            total = sum((t * torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t)).sum() for t in tensors)
            gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        state = [tensor for _, tensor in sorted(module.state_dict().items())]
        return [torch.as_tensor(value) for value in (*results, *gradients, *state)], ""
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Equal integers; floats up to the rounding of sums in another order."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not (torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)):
            return False
    return True


# ---- swapping --------------------------------------------------------------------------------------------------------------


def _swap(module: nn.Module, seam: Seam) -> list[nn.Module]:
    """Put the seam's methods in front of the module's own; returns the submodules that changed."""
    changed = []
    for path, methods in seam.methods.items():
        part = module.get_submodule(path)
        # Residual layers may share one codebook.
        if not hasattr(type(part), "_vqfast_original"):
            part.__class__ = _converted_class(type(part), methods)
            changed.append(part)
    return changed


@functools.cache
def _converted_class(original: type, methods: type) -> type:
    """A subclass of the module's class, under its name, whose methods come first; instances change class, not identity."""
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_vqfast_original": original,
        "_vqfast_methods": methods,
    }
    return type(original.__name__, (methods, original), body)


def _reduce(self, protocol):
    # The class is made at run time, so a copy or a pickle names what it was made of.
    return _rebuild, (type(self)._vqfast_original, type(self)._vqfast_methods), self.__dict__


def _rebuild(original: type, methods: type) -> nn.Module:
    cls = _converted_class(original, methods)
    return cls.__new__(cls)

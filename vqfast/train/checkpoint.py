"""Training checkpoints: one safetensors file each, written whole or not at all, checked before a byte of it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast._files import atomic_file, hash_tensors
from vqfast.models.pretrained import FORMAT as MODEL_FORMAT

FORMAT = "vqfast-checkpoint-1"
_NAME = re.compile(r"step-(\d{9,})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint is cut, altered, of another kind, or does not fit the model."""


class Checkpoint(NamedTuple):
    """Everything a run needs to go on: named tensors, and JSON values (``meta["step"]`` is always there)."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, newest last. Temporary and foreign files do not count."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*.safetensors") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, keep: int) -> Path:
    """Writes ``step-NNNNNNNNN.safetensors`` atomically, then deletes all but the newest ``keep``.

    Args:
        folder: made when absent.
        tensors: any dtype and device; they are copied to the CPU.
        meta: JSON values; ``meta["step"]`` names the file.
        keep: how many checkpoints stay, at least 1.
    """
    from safetensors.torch import save

    content = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **meta}, sort_keys=True)
    path = checkpoint_path(folder, meta["step"])
    with atomic_file(path) as file:
        file.write(save(content, {"vqfast": text, "sha256": hash_tensors(content, text.encode())}))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks one checkpoint.

    Raises:
        CheckpointError: the file is missing, cut, altered, or no vqfast checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({error})") from None
    text = header.get("vqfast")
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but no vqfast training checkpoint")
    if MODEL_FORMAT in text:
        raise CheckpointError(f"{path} is the file of a saved model, no training checkpoint; name its folder, {path.parent}")
    if header.get("sha256") != hash_tensors(tensors, text.encode()):
        raise CheckpointError(f"{path} does not match its checksum: the file was altered")
    meta = json.loads(text)
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has the format {meta.get('format')!r}, this vqfast reads {FORMAT!r}")
    return Checkpoint(tensors, meta)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one sentence for each newer one that is not.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(complaints))
    return None, complaints


def optimizer_to(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named ``optimizer.<parameter>.<key>`` and JSON values for the rest."""
    state, tensors, values = optimizer.state_dict(), {}, {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{parameter}.{key}"] = value
            else:
                values[f"{parameter}.{key}"] = value
    return tensors, {"param_groups": state["param_groups"], "values": values}


def optimizer_from(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Puts back what :func:`optimizer_to` took out."""
    state: dict[int, dict[str, Any]] = {}
    found = [(name.split(".", 2)[1:], value) for name, value in tensors.items() if name.startswith("optimizer.")]
    for (parameter, key), value in [*found, *((name.split(".", 1), value) for name, value in meta["values"].items())]:
        state.setdefault(int(parameter), {})[key] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in meta["param_groups"]
    ]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint's optimizer state does not fit this model: {error}") from None


def load_model_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads the tensors named ``model.*`` into a model, all of them or none.

    Raises:
        CheckpointError: names or shapes differ; the message shows the first few.
    """
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()] + [
        f"{name} is unknown" for name in state.keys() - own.keys()
    ]
    wrong += [
        f"{name} is {list(state[name].shape)}, the model has {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} does not fit this model: {'; '.join(sorted(wrong)[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    model.load_state_dict(state)

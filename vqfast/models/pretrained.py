"""Models in folders: `config.json` says what a model is, `model.safetensors` holds its weights; no pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .._files import atomic_file, hash_tensors, write_atomic

FORMAT = "vqfast-model-1"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"

_CLASSES: dict[str, type[PretrainedModel]] = {}
Model = TypeVar("Model", bound="PretrainedModel")


class ModelFileError(ValueError):
    """A model's file is truncated, altered, of another kind, or does not fit its configuration."""


class PretrainedModel(nn.Module):
    """A model that is wholly described by a configuration dataclass and its state.

    Subclasses set `config_class` (a frozen dataclass of plain JSON values) and take `(config=None,
    **fields)`. They are known to `load_pretrained` by their class name from their definition on.
    """

    config_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            _CLASSES[cls.__name__] = cls

    def __init__(self, config: Any = None, **fields: Any):
        super().__init__()
        self.config = self._make_config(config, fields)

    @classmethod
    def _make_config(cls, config: Any, fields: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        unknown = sorted(fields.keys() - known)
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        if config is None:
            return cls.config_class(**fields)
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"config is a {type(config).__name__}, {cls.__name__} takes a {cls.config_class.__name__} or "
                "its fields as keyword arguments"
            )
        return dataclasses.replace(config, **fields)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes `config.json` and `model.safetensors` into `folder`.

        Each file is written under a temporary name, synced and renamed. The weights file alone is complete
        (it holds the configuration and a sha256 of its tensors too), so a save that is killed leaves the old
        model or the new.

        Args:
            folder: made when it does not exist.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save

        folder = Path(folder)
        tensors = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()
        }
        settings = {
            "format": FORMAT,
            "model": _saved_class(type(self)),
            "config": dataclasses.asdict(self.config),
        }
        # One entry, because safetensors writes several in random order: equal models give equal bytes.
        header = json.dumps({**settings, "sha256": _checksum(settings, tensors)}, sort_keys=True)
        with atomic_file(folder / WEIGHTS_NAME) as file:
            file.write(save(tensors, {"vqfast": header}))
        write_atomic(folder / CONFIG_NAME, json.dumps(settings, indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | os.PathLike, map_location: str | torch.device = "cpu"
    ) -> Model:
        """Loads what `save_pretrained` wrote; the model comes back in eval mode.

        Args:
            folder: with `model.safetensors` and, where it was not removed, `config.json`.
            map_location: device of the weights.

        Returns:
            A model of this class.

        Raises:
            FileNotFoundError: no such folder, or no weights in it.
            ModelFileError: a file is truncated or altered, the two do not belong together, the model is of
                another class, or names or shapes differ from what the configuration asks for.
        """
        settings, tensors = _read_folder(Path(folder))
        name = settings["model"]
        if _CLASSES.get(name) is None or not issubclass(cls, _CLASSES[name]):
            raise ModelFileError(
                f"{folder} holds a {name}, not a {cls.__name__}; load_pretrained(folder) loads either"
            )
        return cls._build(settings["config"], tensors, Path(folder)).to(map_location).eval()

    @classmethod
    def _build(cls: type[Model], config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Model:
        try:
            model = cls(cls.config_class(**_tuples(config)))
        except (TypeError, ValueError) as error:
            raise ModelFileError(
                f"the configuration in {folder} does not describe a {cls.__name__}: {error}"
            ) from None
        own = model.state_dict()
        wrong = [f"{name} is missing" for name in own.keys() - tensors.keys()]
        wrong += [f"{name} is unknown" for name in tensors.keys() - own.keys()]
        for name in own.keys() & tensors.keys():
            saved, expected = tensors[name], own[name]
            if saved.shape != expected.shape or not _same_kind(saved, expected):
                wrong.append(
                    f"{name} is {saved.dtype} {list(saved.shape)}, the model has {expected.dtype} "
                    f"{list(expected.shape)}"
                )
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ModelFileError(
                f"{folder / WEIGHTS_NAME} does not fit its {cls.__name__}: "
                f"{'; '.join(sorted(wrong)[:3])}{more}"
            )
        # Assigned, not copied: a model that was saved in half precision comes back in half precision.
        model.load_state_dict(tensors, strict=True, assign=True)
        return model


def load_pretrained(folder: str | os.PathLike, map_location: str | torch.device = "cpu") -> PretrainedModel:
    """Loads a saved model of whatever class it is; raises as `PretrainedModel.from_pretrained`."""
    settings, tensors = _read_folder(Path(folder))
    cls = _CLASSES.get(settings["model"])
    if cls is None:
        raise ModelFileError(
            f"{folder} holds a {settings['model']}; this vqfast knows {', '.join(sorted(_CLASSES))}"
        )
    return cls._build(settings["config"], tensors, Path(folder)).to(map_location).eval()


def _saved_class(cls: type) -> str:
    """The name under which a model is saved: its nearest class that owns a configuration."""
    return next(base.__name__ for base in cls.__mro__ if "config_class" in base.__dict__)


def _same_kind(saved: Tensor, expected: Tensor) -> bool:
    """Floating weights may have any floating dtype, everything else keeps its own."""
    return saved.dtype == expected.dtype or (saved.is_floating_point() and expected.is_floating_point())


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; configurations have no lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a saved model, checked for everything that can be checked without the class."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        what = f"{folder} has no {WEIGHTS_NAME}" if folder.is_dir() else f"there is no folder {folder}"
        raise FileNotFoundError(f"{what}; expected a folder that save_pretrained wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{path} is truncated or not a safetensors file ({error}); copy it again"
        ) from None
    text = header.get("vqfast")
    if text is None:
        raise ModelFileError(f"{path} is a safetensors file, but not one that vqfast's save_pretrained wrote")
    try:
        settings = dict(json.loads(text))
    except (ValueError, TypeError):
        settings = {}
    if settings.pop("sha256", None) != _checksum(settings, tensors):
        raise ModelFileError(f"{path} does not match its checksum: the file was altered; copy it again")
    if settings.get("format") != FORMAT:
        raise ModelFileError(f"{path} has format {settings.get('format')!r}, this vqfast reads {FORMAT!r}")
    _compare_config(folder, settings)
    return settings, tensors


def _checksum(settings: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return hash_tensors(tensors, json.dumps(settings, sort_keys=True).encode())


def _compare_config(folder: Path, settings: dict[str, Any]) -> None:
    """config.json may be absent; when it is there, it must say what the weights say."""
    path = folder / CONFIG_NAME
    if not path.exists():
        return
    try:
        shown = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from None
    if shown != settings:
        raise ModelFileError(
            f"{path} does not describe the model in {WEIGHTS_NAME} beside it; the weights file holds its own "
            f"copy of the configuration, so remove {CONFIG_NAME} if the weights are the ones you want"
        )

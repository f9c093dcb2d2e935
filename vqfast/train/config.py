"""The configuration of a run: TOML in, every key overridable, unknown keys refused with a suggestion, JSON out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqfast.models import (
    PRESETS,
    VAE,
    VQVAE,
    VQVAE2,
    GatedPixelCNN,
    GatedPixelCNNConfig,
    PixelCNN,
    PixelCNNConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    PriorConfig,
    VAEConfig,
    VQVAE2Config,
    VQVAEConfig,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to write instead."""


def _key(default: Any, help: str, *, least: float | None = None, most: float | None = None, choices: tuple = ()) -> Any:
    """One configuration key with its default, its meaning and its limits (both inclusive)."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class DataConfig:
    source: str = _key("photographs", "photographs (embedded), cifar10, mnist, or a folder of pictures")
    test: str = _key(
        "", "folder of pictures to judge by; empty: the source's own test part, for a folder the training pictures"
    )
    folder: str = _key("", "where the files of cifar10 or mnist lie; empty: where `vqfast data` puts them")
    size: int = _key(64, "side of the square crops in pixels (pictures of cifar10 are 32, of mnist 28)", least=4)
    resize: int = _key(0, "scale the shorter side to this many pixels before cropping; 0: no", least=0)
    flip: bool = _key(False, "mirror half of the training pictures")
    batch_size: int = _key(32, "pictures per process and accumulation round", least=1)
    workers: int = _key(0, "threads that decode pictures ahead", least=0, most=1024)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = _key(10_000, "optimizer steps in all", least=1)
    learning_rate: float = _key(3e-4, "Adam's step size", least=0.0, most=1e6)
    schedule: str = _key("constant", "course of the learning rate", choices=("constant", "cosine"))
    warmup: int = _key(0, "steps in which the learning rate rises from 0", least=0)
    clip_norm: float = _key(0.0, "largest gradient norm; 0: no limit", least=0.0)
    accumulate: int = _key(1, "forward and backward rounds per optimizer step", least=1)
    init: str = _key(
        "kmeans",
        "how the codebook starts: k-means on the first pictures, or as the layer made it",
        choices=("kmeans", "none"),
    )
    init_pictures: int = _key(128, "pictures whose latents k-means sees", least=1)
    seed: int = _key(0, "seed of weights and of everything random in training", least=0, most=2**63 - 1)
    device: str = _key("auto", "auto, cpu, cuda or cuda:N")
    bf16: bool = _key(False, "bfloat16 autocast for encoder and decoder; the quantizer stays exact")
    threads: int = _key(0, "CPU threads; 0: torch's own choice", least=0, most=1024)
    log_every: int = _key(50, "steps between two lines of metrics", least=1)
    picture_every: int = _key(500, "steps between two picture grids and plots; 0: only at the end", least=0)
    checkpoint_every: int = _key(500, "steps between two checkpoints; 0: only at the end", least=0)
    keep: int = _key(3, "checkpoints that are kept", least=1)
    tensorboard: bool = _key(False, "write TensorBoard events too (needs tensorboard)")


@dataclass(frozen=True)
class CodesConfig:
    """What a prior is trained on: the codes of [data]'s pictures under a model."""

    model: str = _key("", "the trained model: a run's folder, a checkpoint file, or a folder from save_pretrained")
    labels: bool = _key(False, "condition on the pictures' classes (cifar10, mnist, or a folder with a folder per class)")
    views: int = _key(0, "random crops of each picture, mirrored by data.flip; 0: its centre crop, once", least=0)
    limit: int = _key(0, "use at most so many pictures; 0: all", least=0)
    held_out: int = _key(1000, "pictures of the test part whose codes judge the prior", least=1)


@dataclass(frozen=True)
class Config:
    """What a run is: the model's class and configuration, and the keys of [data] and [train]; [codes] for a prior."""

    kind: str = "vqvae"
    model: VQVAEConfig | VAEConfig | VQVAE2Config | PriorConfig = VQVAEConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    codes: CodesConfig | None = None

    def to_dict(self) -> dict:
        """Nested plain values: what ``config.json`` holds and what :func:`config_from` takes."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in ("model", *sections_of(self.kind))}
        return {**sections, "model": {"kind": self.kind, **sections["model"]}}


SECTIONS: dict[str, type] = {"data": DataConfig, "train": TrainConfig}
MODELS: dict[str, tuple[type, type]] = {
    "vqvae": (VQVAE, VQVAEConfig),
    "vae": (VAE, VAEConfig),
    "vqvae2": (VQVAE2, VQVAE2Config),
}
PRIORS: dict[str, tuple[type, type]] = {
    "gated": (GatedPixelCNN, GatedPixelCNNConfig),
    "pixelcnn": (PixelCNN, PixelCNNConfig),
    "snail": (PixelSNAIL, PixelSNAILConfig),
}


def sections_of(kind: str) -> dict[str, type]:
    """The sections beside [model] that a run of this kind has."""
    return SECTIONS | ({"codes": CodesConfig} if kind in list(PRIORS) else {})  # a list: a wrong kind may have no hash


def build_model(config: Config):
    """A fresh model of a run, weights from torch's generator.

    Raises:
        ConfigError: a setting that only the model's layers check.
    """
    try:
        return (MODELS | PRIORS)[config.kind][0](config.model)
    except (ValueError, TypeError) as error:  # the layer names the setting
        raise ConfigError(f"[model]: {error}") from None


def config_from(values: Mapping[str, Any]) -> Config:
    """A checked configuration from nested plain values, as TOML or JSON give them.

    Args:
        values: ``{"model": {"kind": "vqvae", ...}, "data": {...}, "train": {...}}``; whatever is absent has its
            default.

    Raises:
        ConfigError: an unknown section or key, a wrong type, or a value outside its limits.
    """
    model = values.get("model", {})
    kind = model.get("kind", "vqvae") if isinstance(model, Mapping) else "vqvae"
    kinds = MODELS | PRIORS
    sections = sections_of(kind)
    known = ("model", *sections)
    for section in values:
        if section not in known:
            raise ConfigError(
                f"unknown section [{section}]{did_you_mean(section, known)}; the sections are {', '.join(known)}"
            )
    check_sections(values)
    if kind not in list(kinds):
        raise ConfigError(
            f"model.kind is {kind!r}{did_you_mean(str(kind), kinds)}; it must be one of {', '.join(kinds)}"
        )
    parts = {name: _section(name, section, values.get(name, {})) for name, section in sections.items()}
    try:
        fields = {key: value for key, value in model.items() if key != "kind"}
        return Config(kind, _section("model", kinds[kind][1], fields), **parts)
    except (ValueError, TypeError) as error:  # the model's own checks name the field
        raise error if isinstance(error, ConfigError) else ConfigError(f"[model]: {error}") from None


def check_sections(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that stands where a section with keys belongs."""
    for section, keys in values.items():
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{section} must be a section with keys, like [{section}] in TOML, got {keys!r}")


def preset_values(name: str) -> dict:
    """The nested values of a preset.

    Raises:
        ConfigError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"there is no preset {name!r}{did_you_mean(name, PRESETS)}; the presets are {', '.join(PRESETS)}"
        )
    preset = PRESETS[name]
    kind = next(kind for kind, (_, config) in MODELS.items() if isinstance(preset.model, config))
    settings = preset.training
    return {
        "model": {"kind": kind, **dataclasses.asdict(preset.model)},
        "data": {
            "source": "" if settings.dataset == "folder" else settings.dataset,
            "size": settings.size,
            "resize": settings.resize,
            "flip": settings.flip,
            "batch_size": settings.batch_size,
        },
        "train": {"steps": settings.steps, "learning_rate": settings.learning_rate},
    }


def _section(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    """One dataclass section, each value checked for type, limits and choices."""
    fields, types_ = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    checked = {}
    for key, value in values.items():
        name = f"{section}.{key}"
        if key not in fields:
            raise _unknown(name, section, kind)
        limits = {"choices": (), "least": None, "most": None, **fields[key].metadata}
        value = checked[key] = check_value(name, value, types_[key])
        if limits["choices"] and value not in limits["choices"]:
            raise ConfigError(
                f"{name} is {value!r}{did_you_mean(str(value), limits['choices'])}; "
                f"it must be one of {', '.join(limits['choices'])}"
            )
        if limits["least"] is not None and value < limits["least"]:
            raise ConfigError(f"{name} is {value}, but must be at least {limits['least']}")
        if limits["most"] is not None and value > limits["most"]:
            raise ConfigError(f"{name} is {value}, but must be at most {limits['most']}")
    return kind(**checked)


def check_value(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind`` (bool, int, float, str, tuples of them, unions, Literals).

    An integer is taken for a float, a list for a tuple. Nothing else is converted.

    Raises:
        ConfigError: the value has another type, or is not finite.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return check_value(name, value, option)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"{name} is {value!r}{did_you_mean(str(value), [str(a) for a in arguments])}; it must be one of "
            f"{', '.join(map(str, arguments))}"
        )
    elif origin in (tuple, list, Sequence) and isinstance(value, (list, tuple)):
        return tuple(check_value(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    elif kind is Any or (kind is type(None) and value is None):
        return value
    elif kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number")
        return float(value)
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise ConfigError(f"{name} is {value!r}, but must be {_type_name(kind)}")


def _type_name(kind: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "empty"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in arguments if option is not type(None))
    if origin in (tuple, list, Sequence):
        return f"a list like [..., ...] of {_type_name(arguments[0]).removeprefix('a ')}s"
    return names.get(kind, str(kind))


def read_toml(path: str | os.PathLike) -> dict:
    """The nested values of a TOML file.

    Raises:
        ConfigError: there is no such file, it is not TOML (the message has the line), or a section has no keys.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    check_sections(values)
    return values


def read_json(path: str | os.PathLike) -> dict:
    """The nested values of a run's ``config.json``. Raises ConfigError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it must hold sections with keys, like {{\"train\": ...}}, got {values!r}")
    return values


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"train.steps=100"`` as ``("train.steps", 100)``: the value is read as TOML, or as plain text when it is no
    TOML.

    Raises:
        ConfigError: there is no ``=`` or no section.
    """
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or "." not in key:
        raise ConfigError(f"--set takes SECTION.KEY=VALUE, like --set model.dim=64, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def merged(*layers: Mapping[str, Any]) -> dict:
    """Nested values laid over each other: the last layer that has a key wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        for section, keys in layer.items():
            old = result.get(section, {})
            result[section] = {**old, **keys} if isinstance(keys, Mapping) and isinstance(old, Mapping) else keys
    return result


def assigned(assignments: Mapping[str, Any]) -> dict:
    """``{"train.steps": 3}`` as ``{"train": {"steps": 3}}``."""
    return merged(
        *(
            {section: {key: value}}
            for (section, _, key), value in ((name.partition("."), value) for name, value in assignments.items())
        )
    )


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """The words `, did you mean X?` when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _unknown(name: str, section: str, kind: type) -> ConfigError:
    """The error for an unknown key: the closest known one of any section, or all keys of this one."""
    sections = {"model": VQVAEConfig, **SECTIONS, "codes": CodesConfig, section: kind}
    known = [f"{other}.{f.name}" for other, fields in sections.items() for f in dataclasses.fields(fields)]
    hint = did_you_mean(name, known)
    own = ", ".join(f.name for f in dataclasses.fields(kind))
    return ConfigError(f"unknown key {name}{hint or f'; [{section}] has {own}'}")


def to_json(config: Config) -> str:
    """The resolved configuration as people and ``--resume`` read it."""
    return json.dumps(config.to_dict(), indent=2) + "\n"

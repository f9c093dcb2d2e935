"""Priors in folders: their training, one network per level of codes, and how to find them again.

A prior's folder holds ``config.json`` (the values of the run), ``prior.json`` (whose codes it models, their shapes and
classes) and ``level-0`` (finest), ``level-1``, ...: each the folder of a run like those of ``vqfast train``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqfast._files import write_atomic
from vqfast.models import PRIOR_PRESETS, CodePrior, HierarchicalPrior, ModelFileError, load_pretrained
from vqfast.models.priors import code_loss
from vqfast.tokens import model_hash
from vqfast.train import checkpoint as checkpoints
from vqfast.train.codes import Codes, Crops, RowNumbers, encode_dataset
from vqfast.train.config import PRIORS, Config, ConfigError, check_sections, config_from, did_you_mean, merged, read_json
from vqfast.train.loop import Outcome, Say, Trainer
from vqfast.train.plots import Chart, save_charts
from vqfast.train.ranks import Ranks, start_ranks
from vqfast.train.runs import changed_config, find_model, finish
from vqfast.train.sources import open_sources, skipped_lines

FORMAT = "vqfast-priors-1"
# What the codes decide; a configuration cannot.
FROM_CODES = ("codebook_size", "classes", "condition_codes", "condition_scale")


def level_folder(folder: Path, level: int) -> Path:
    return folder / f"level-{level}"


# ---- one level ----


class PriorTrainer(Trainer):
    """Trains the prior of one level.

    Args:
        codes, held_out: to learn from and to judge by, all levels.
        level: 0 is the finest.
        The others as `Trainer`.
    """

    def __init__(self, config: Config, folder: Path, ranks: Ranks, codes: Codes, held_out: Codes, level: int, **options):
        self.codes, self.held_out, self.level = codes, held_out, level
        super().__init__(config, folder, ranks, **options)

    def _open(self) -> None:
        self.dataset = RowNumbers(len(self.codes))

    def _losses(self, batch: Tensor) -> dict[str, Tensor]:
        codes, labels, above = self.codes.rows(batch, self.level, self.ranks.device)
        with self._autocast():
            logits = self.forward(codes, labels, above)
        loss = code_loss(logits, codes)
        return {"loss": loss, "bits_per_code": loss / math.log(2)}

    def describe(self) -> list[str]:
        rows, columns = self.codes.levels[self.level].shape[1:]
        classes = f", {len(self.codes.classes)} classes" if self.codes.classes else ""
        return [
            f"prior      {self.config.kind}, {self.weights:,} weights, level {self.level}: {rows}x{columns} codes of "
            f"{self.config.model.codebook_size}{classes}",
            f"data       {self.config.data.source}, {len(self.codes):,} maps of codes from {self.config.codes.model}",
        ]

    def draw(self) -> None:
        """Writes ``plots/training.svg`` and ``.png``: bits per code in training, beside what single codes cost."""
        steps, bits = self.log.column("bits_per_code")
        alone = self.unigram_bits()
        series = {"prior": (steps, bits), "single codes' frequencies": (steps, [alone] * len(steps))}
        save_charts([Chart("bits per code", "step", series)], self.folder / "plots" / "training.svg")

    def unigram_bits(self) -> float:
        """Bits per held-out code when each costs -log2 of its frequency in training, one added to every count."""
        size = self.config.model.codebook_size
        counts = torch.bincount(self.codes.levels[self.level].flatten(), minlength=size).double() + 1
        held = torch.bincount(self.held_out.levels[self.level].flatten(), minlength=size).double()
        return -(held / held.sum() * (counts / counts.sum()).log2()).sum().item()

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Bits per held-out code: of the prior, of single codes' frequencies, of the uniform distribution."""
        self.model.eval()
        parts = torch.arange(len(self.held_out)).split(32)
        bits = [self.model.bits_per_code(*self.held_out.rows(part, self.level, self.ranks.device)) for part in parts]
        return {
            "bits_per_code": torch.cat(bits).mean().item(),
            "unigram": self.unigram_bits(),
            "uniform": math.log2(self.config.model.codebook_size),
        }


# ---- a run over all levels ----


def prior_preset_values(name: str) -> dict[str, Any]:
    """The nested values of a preset: its networks' settings that differ from the defaults, and its training.

    Raises:
        ConfigError: there is no such preset; the message lists them.
    """
    if name not in PRIOR_PRESETS:
        hint = did_you_mean(name, PRIOR_PRESETS)
        raise ConfigError(f"there is no preset {name!r}{hint}; those of priors are {', '.join(PRIOR_PRESETS)}")
    preset = PRIOR_PRESETS[name]
    kind = next(kind for kind, (_, config) in PRIORS.items() if type(preset.levels[0]) is config)
    networks = [
        {
            field.name: getattr(level, field.name)
            for field in dataclasses.fields(level)
            if field.name not in FROM_CODES and getattr(level, field.name) != field.default
        }
        for level in preset.levels
    ]
    own = {f"level-{i}": network for i, network in enumerate(networks)} if len(networks) > 1 else {}
    return {
        "model": {"kind": kind, **({} if own else networks[0])},
        **own,
        "data": {"batch_size": preset.batch_size},
        "train": {"steps": preset.steps, "learning_rate": preset.learning_rate, "clip_norm": 1.0},
        "codes": {"labels": preset.labels},
    }


def begin_priors(values: Mapping[str, Any], folder: Path, *, say: Say = print, watch: Callable | None = None) -> Outcome:
    """Trains a prior for every level of a model's codes into a new folder, the coarsest level first.

    Args:
        values: nested configuration values: [model] is the network of every level, [level-0], [level-1], ... what
            differs for one, [codes] what is modelled; [data] and [train] as for ``vqfast train``. Where [data] does not
            say otherwise, the pictures are those that the model was trained on.
        folder: must not hold a run yet.
        watch: called with each level's trainer before its first step.

    Raises:
        ConfigError: the configuration cannot be used, or the folder already holds a run.
        TrainingError: training cannot go on.
    """
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} already holds a run; go on with it by --resume, or choose another folder with --out")
    return _train_priors(values, folder, say, watch)


def resume_priors(folder: Path, overrides: Mapping[str, Any], *, say: Say = print) -> Outcome:
    """Goes on with the run in a folder: finished levels stay, an unfinished one goes on from its newest checkpoint.

    Args:
        overrides: nested values that replace those of the run, such as more steps. The networks cannot change.

    Raises:
        ConfigError, CheckpointError: no run, a changed network or model, or no whole checkpoint.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no run (it has no config.json); nothing to resume")
    return _train_priors(merged(read_json(folder / "config.json"), overrides), folder, say, None)


def _train_priors(values: Mapping[str, Any], folder: Path, say: Say, watch: Callable | None) -> Outcome:
    base, networks = _split(values)
    shared = config_from(base)
    if not shared.codes.model:
        raise ConfigError("say whose codes the prior is to model: vqfast train-prior MODEL, or codes.model")
    model, trained, _ = find_model(Path(shared.codes.model))
    _check_model(model, networks, shared.codes.model)
    _check_hash(model, folder, shared.codes.model)
    base = _inherited(base, trained)
    shared = config_from(base)
    with start_ranks(shared.train.device) as ranks:
        talk = say if ranks.first else lambda text: None
        if shared.train.threads:
            torch.set_num_threads(shared.train.threads)
        codes, held_out = _encode(model, shared, ranks, talk)
        levels = range(len(codes.levels))
        configs = [_level_config(base, networks, level, model, codes) for level in levels]
        # Every level is checked before anything is written: what is refused must leave the run as it was.
        begun = [_resumed(level_folder(folder, level), configs[level]) for level in levels]
        for level in reversed(levels):
            place = level_folder(folder, level)
            config, start, notes = begun.pop()
            trainers: list[PriorTrainer] = []

            def make() -> PriorTrainer:
                trainers.append(PriorTrainer(config, place, ranks, codes, held_out, level, start=start, say=say))
                if ranks.first and level == levels[-1]:
                    write_atomic(folder / "config.json", json.dumps({**base, **networks}, indent=2) + "\n")
                    _write_description(folder, model, codes)
                return trainers[0]

            outcome = finish(make, talk, f"vqfast train-prior --resume {folder}", watch, notes)
            if outcome.interrupted:
                return outcome
            if ranks.first:
                _report(trainers[0], talk)
        return outcome


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict]]:
    """The sections for all levels, and those of single levels."""
    check_sections(values)
    networks = {name: dict(keys) for name, keys in values.items() if name.startswith("level-")}
    base = {name: keys for name, keys in values.items() if name not in networks}
    model = {"kind": "gated", **base.get("model", {})}
    if model["kind"] not in list(PRIORS):
        raise ConfigError(f"model.kind is {model['kind']!r}; a prior is one of {', '.join(PRIORS)}")
    for section, keys in {"model": model, **networks}.items():
        for key in FROM_CODES:
            if key in keys:
                raise ConfigError(f"{section}.{key} follows from the codes; leave it out")
    return {**base, "model": model, "codes": dict(base.get("codes", {}))}, networks


def _check_model(model: torch.nn.Module, networks: Mapping[str, dict], name: str) -> None:
    if not model.quantizers or getattr(model.config, "groups", 1) != 1:
        raise ConfigError(f"{name} must be a VQ-VAE or VQ-VAE-2 with one group of codes per level; this one has not")
    known = [f"level-{i}" for i in range(len(model.quantizers))]
    for section in networks:
        if section not in known:
            raise ConfigError(f"[{section}]: {name} has the levels {', '.join(known)}")


def _check_hash(model: torch.nn.Module, folder: Path, name: str) -> None:
    if (folder / "prior.json").exists() and read_description(folder)["model"] != model_hash(model.state_dict()):
        raise ConfigError(f"the prior in {folder} models another model's codes than {name}'s; choose another --out")


def _inherited(base: dict[str, Any], trained: Config | None) -> dict[str, Any]:
    """[data] completed by what the model was trained on; of other pictures only the crops' size is the model's."""
    if trained is None:
        return base
    data, old = dict(base.get("data", {})), dataclasses.asdict(trained.data)
    same = data.get("source", old["source"]) == old["source"]
    keys = ("source", "test", "folder", "size", "resize", "flip") if same else ("size",)
    return {**base, "data": {**{key: old[key] for key in keys}, **data}}


def _encode(model: torch.nn.Module, config: Config, ranks: Ranks, talk: Say) -> tuple[Codes, Codes]:
    """The codes to learn from and those to judge by; says which pictures were skipped."""
    sources, settings = open_sources(config.data, model.config.in_channels), config.codes
    model.to(ranks.device)
    shared = {"labels": settings.labels, "seed": config.train.seed}
    codes = encode_dataset(model, sources.train, ranks, views=settings.views, limit=settings.limit, **shared)
    crops = Crops(sources.test, *sources.train[0].shape[1:])
    held_out = encode_dataset(model, crops, ranks, limit=settings.held_out, classes=codes.classes, **shared)
    model.cpu()
    for line in skipped_lines({**sources.train.skipped, **sources.test.skipped}):
        talk(line)
    return codes, held_out


def _level_config(base: Mapping, networks: Mapping, level: int, model: torch.nn.Module, codes: Codes) -> Config:
    sizes = [quantizer.codebook_size for quantizer in model.quantizers]
    given: dict[str, Any] = {"codebook_size": sizes[level], "classes": len(codes.classes)}
    if level + 1 < len(sizes):
        scale = codes.levels[level].shape[1] // codes.levels[level + 1].shape[1]
        given |= {"condition_codes": sizes[level + 1], "condition_scale": scale}
    return config_from(merged(base, {"model": networks.get(f"level-{level}", {})}, {"model": given}))


def _resumed(folder: Path, config: Config):
    """(configuration, checkpoint or None, notes) of a level that may have begun before."""
    if not (folder / "config.json").exists():
        return config, None, []
    config, notes = changed_config(folder, config.to_dict())
    start, complaints = checkpoints.load_latest(folder / "checkpoints")
    return config, start, [*(f"skipped: {text}" for text in complaints), *notes]


def _report(trainer: PriorTrainer, talk: Say) -> None:
    judged = trainer.judge()
    write_atomic(trainer.folder / "held_out.json", json.dumps(judged, indent=2) + "\n")
    talk(
        f"level {trainer.level}: {judged['bits_per_code']:.3f} bits per held-out code; by single codes' frequencies "
        f"{judged['unigram']:.3f}, uniform {judged['uniform']:.3f}\n"
    )


# ---- finding them again ----


def _write_description(folder: Path, model: torch.nn.Module, codes: Codes) -> None:
    """Rows and columns of each level in training: sampling draws maps of that size unless told otherwise."""
    settings = {
        "format": FORMAT,
        "model": model_hash(model.state_dict()),
        "shapes": [list(level.shape[1:]) for level in codes.levels],
        "classes": list(codes.classes),
    }
    write_atomic(folder / "prior.json", json.dumps(settings, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """``prior.json``: "model" (hash), "shapes" and "classes". Raises ConfigError."""
    path = folder / "prior.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no prior (it has no prior.json); make one with: vqfast train-prior MODEL --out {folder}"
        )
    settings = read_json(path)
    if settings.get("format") != FORMAT:
        raise ConfigError(f"{path} is no description of priors that this vqfast reads ({FORMAT})")
    try:
        sizes = [size for rows, columns in settings["shapes"] for size in (rows, columns)]
        whole = sizes and all(type(size) is int and size > 0 for size in sizes)
        whole = whole and isinstance(settings["model"], str) and isinstance(settings["classes"], list)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ConfigError(
            f"{path} is damaged: it must hold \"model\" (a hash), \"shapes\" (rows and columns of each level) and "
            f"\"classes\" (a list); remove it, and vqfast train-prior --resume {folder} writes it anew"
        )
    return settings


def find_priors(
    model_path: str | Path, prior_path: str | Path
) -> tuple[torch.nn.Module, CodePrior | HierarchicalPrior, dict[str, Any]]:
    """A model, its prior (all levels) and the prior's description, as `read_description`.

    Raises:
        ConfigError: nothing there, the prior is not complete, or the two do not belong together.
        CheckpointError, ModelFileError: a file is damaged.
    """
    model, _, _ = find_model(Path(model_path))
    settings = read_description(Path(prior_path))
    if settings["model"] != model_hash(model.state_dict()):
        raise ConfigError(
            f"the prior in {prior_path} was trained on another model's codes than {model_path}'s; train one for it"
        )
    folders = [level_folder(Path(prior_path), level) / "model" for level in range(len(settings["shapes"]))]
    missing = [str(f) for f in folders if not f.is_dir()]
    if missing:
        raise ConfigError(
            f"the prior is not complete: {', '.join(missing)} is missing; go on with vqfast train-prior --resume {prior_path}"
        )
    levels = [load_pretrained(f) for f in folders]
    for place, level in zip(folders, levels):
        if not isinstance(level, CodePrior):
            raise ModelFileError(
                f"{place} holds a {type(level).__name__}, but must hold a prior; remove it, and vqfast train-prior --resume "
                f"{prior_path} writes it anew"
            )
    try:
        return model, levels[0] if len(levels) == 1 else HierarchicalPrior(levels), settings
    except ValueError as error:
        raise ModelFileError(f"the levels in {prior_path} are not of one training: {error}") from None

"""Runs as folders: begin one, go on with one, and find the model in one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqfast.models import CodePrior, ModelFileError, load_pretrained
from vqfast.train import checkpoint as checkpoints
from vqfast.train.checkpoint import CheckpointError
from vqfast.train.config import PRIORS, Config, ConfigError, build_model, config_from, merged, read_json
from vqfast.train.log import read_metrics
from vqfast.train.loop import Outcome, Say, Trainer, TrainingError
from vqfast.train.pictures import PictureTrainer
from vqfast.train.ranks import start_ranks


def begin_run(values: Mapping[str, Any], folder: Path, *, say: Say = print, watch: Callable | None = None) -> Outcome:
    """Trains from the first step into a new folder.

    Args:
        values: nested configuration values, see :func:`~vqfast.train.config.config_from`.
        folder: must not hold a run yet.
        watch: called with the :class:`~vqfast.train.loop.Trainer` before the first step.

    Raises:
        ConfigError: the configuration cannot be used, or the folder already holds a run.
        TrainingError: training cannot go on.
    """
    config = config_from(values)
    if (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} already holds a run; go on with it by --resume {folder}, or choose another folder with --out"
        )
    return _train(config, folder, None, say, watch)


def resume_run(folder: Path, overrides: Mapping[str, Any], *, say: Say = print) -> Outcome:
    """Goes on with the run in a folder, from its newest whole checkpoint; from the start when there is none yet.

    Args:
        folder: with the ``config.json`` that :func:`begin_run` wrote.
        overrides: nested values that replace those of the run, such as more steps. The model cannot change.

    Raises:
        ConfigError, CheckpointError: no run, no whole checkpoint, or a changed model.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no run (it has no config.json); nothing to resume")
    config, notes = changed_config(folder, overrides)
    start, complaints = checkpoints.load_latest(folder / "checkpoints")
    return _train(config, folder, start, say, None, [*(f"skipped: {text}" for text in complaints), *notes])


def changed_config(folder: Path, overrides: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration of the run in a folder with other values laid over it, and one line for each change.

    Raises:
        ConfigError: the model would change.
    """
    before = config_from(read_json(folder / "config.json"))
    config = config_from(merged(before.to_dict(), overrides))
    changes = differences(before, config)
    if any(name.startswith("model.") for name in changes):
        raise ConfigError(f"the model of a run cannot change: {', '.join(changes)}; begin a new run with --out")
    return config, [f"changed: {change}" for change in changes]


def _train(config: Config, folder: Path, start, say: Say, watch, notes: Sequence[str] = ()) -> Outcome:
    if config.kind in PRIORS:
        raise ConfigError(f"model.kind {config.kind!r} is a prior over codes; train it with vqfast train-prior")
    with start_ranks(config.train.device) as ranks:
        make = lambda: PictureTrainer(config, folder, ranks, start=start, say=say)  # noqa: E731
        return finish(make, say if ranks.first else _silent, f"vqfast train --resume {folder}", watch, notes)


def _silent(text: str) -> None:
    pass


def finish(make: Callable[[], Trainer], talk: Say, again: str, watch=None, notes: Sequence[str] = ()) -> Outcome:
    """Makes a trainer and runs it to its end, saying what is about to happen and, if it was stopped, how to go on.

    Args:
        make: makes the trainer.
        again: the command that goes on with a run that was stopped.
        watch: called with the trainer before the first step.
        notes: lines to be said first.
    """
    for note in notes:
        talk(note)
    trainer = make()
    try:
        for line in describe(trainer):
            talk(line)
        if watch is not None:
            watch(trainer)
        outcome = trainer.run()
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not (trainer.folder / "config.json").exists():
            raise
        raise TrainingError(
            f"training stopped at step {trainer.step} because {error.filename or trainer.folder} cannot be written or read: "
            f"{error.strerror or error}. Put that right, then go on with: {again}"
        ) from None
    finally:
        trainer.close()
    if outcome.interrupted:
        steps = trainer.config.train.steps
        talk(f"stopped at step {outcome.step} of {steps}; everything is saved. Go on with:\n  {again}")
    return outcome


def describe(trainer: Trainer) -> list[str]:
    """What is about to happen, for people."""
    config, ranks = trainer.config, trainer.ranks
    threads = f", {torch.get_num_threads()} threads" if ranks.device.type == "cpu" else ""
    many = f", {ranks.world_size} processes" if ranks.world_size > 1 else ""
    step = f"from step {trainer.step} " if trainer.step else ""
    samples = config.data.batch_size * config.train.accumulate * ranks.world_size
    return [
        f"run        {trainer.folder}",
        *trainer.describe(),
        f"device     {ranks.device}{threads}{many}",
        f"steps      {step}to {config.train.steps}, {samples} pictures each",
    ]


def find_model(path: Path) -> tuple[torch.nn.Module, Config | None, str]:
    """The model at a path: a run's folder (its newest checkpoint), one checkpoint file, or a folder from
    ``save_pretrained``.

    Returns:
        The model in eval mode on the CPU, the run's configuration if there is one, and where the weights came from.
        Checkpoints that are damaged are named on stderr when an older one takes their place.

    Raises:
        ConfigError, CheckpointError, ModelFileError: nothing there, it is damaged, or it is a prior.
    """
    found = _find(path)
    if isinstance(found[0], CodePrior):
        raise ConfigError(
            f"{path} holds a prior, which models codes and not pictures; name the model that it was trained for"
        )
    return found


def _find(path: Path) -> tuple[torch.nn.Module, Config | None, str]:
    if path.is_file():
        return _from_checkpoint(checkpoints.load_checkpoint(path), str(path))
    if (path / "checkpoints").is_dir():
        try:
            start, complaints = checkpoints.load_latest(path / "checkpoints")
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_whole_model(path / 'model')}") from None
        for text in complaints:
            print(f"skipped: {text}", file=sys.stderr)
        if start is not None:
            return _from_checkpoint(start, f"{path}, step {start.meta['step']}")
    if (path / "model.safetensors").exists():
        return load_pretrained(path), None, str(path)
    if (path / "prior.json").exists():
        raise ConfigError(f"{path} holds a prior, which models codes and not pictures; name the model that it was trained for")
    if (path / "config.json").exists():
        raise CheckpointError(f"the run in {path} has no checkpoint yet; let it train longer")
    raise ConfigError(
        f"there is no model in {path}; give a run's folder, a checkpoint file, or a folder from save_pretrained"
        if path.exists()
        else f"there is no {path}; give a run's folder, a checkpoint file, or a folder from save_pretrained"
    )


def _whole_model(folder: Path) -> str:
    """The end of a sentence about damaged checkpoints: the finished model beside them, if it can stand in for them."""
    try:
        load_pretrained(folder)
    except (OSError, ModelFileError):
        return ""
    return f"; the finished model is whole, name its folder: {folder}"


def _from_checkpoint(start, source: str) -> tuple[torch.nn.Module, Config, str]:
    config = config_from(start.meta["config"])
    model = build_model(config)
    checkpoints.load_model_tensors(model, start.tensors, source)
    return model.eval(), config, source


def last_metrics(folder: Path) -> dict:
    """The newest line of a run's metrics, or {}."""
    return (read_metrics(folder / "metrics.jsonl") or [{}])[-1]


def differences(before: Config, after: Config) -> list[str]:
    """One text like `train.steps 4 -> 6` for each setting that differs."""
    a, b = before.to_dict(), after.to_dict()
    return [
        f"{section}.{key} {a[section].get(key)} -> {value}"
        for section in b
        for key, value in b[section].items()
        if a[section].get(key) != value
    ]

"""Priors in folders, for the commands: `prior.json` says whose codes they model, level-0 (finest), level-1, ...
hold them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vqfast._files import write_atomic
from vqfast.cli import UserError
from vqfast.models.pixelcnn import GatedPixelCNN, PixelCNN
from vqfast.models.pixelsnail import PixelSNAIL
from vqfast.models.pretrained import load_pretrained
from vqfast.models.priors import CodePrior, HierarchicalPrior
from vqfast.models.vqvae2 import VQVAE2  # noqa: F401  (load_pretrained knows the models that are defined)
from vqfast.tokens import model_hash
from vqfast.train.runs import find_model

KINDS = {"gated": GatedPixelCNN, "pixelcnn": PixelCNN, "snail": PixelSNAIL}
FORMAT = "vqfast-priors-1"


def level_folder(folder: Path, level: int) -> Path:
    return folder / f"level-{level}"


def write_description(folder: Path, model: torch.nn.Module, shapes: list[tuple[int, ...]], classes: list[str]) -> None:
    """`shapes`: rows and columns of each level in training; sampling draws maps of that size unless told otherwise."""
    settings = {
        "format": FORMAT,
        "model": model_hash(model.state_dict()),
        "shapes": [list(s) for s in shapes],
        "classes": classes,
    }
    write_atomic(folder / "prior.json", json.dumps(settings, indent=2) + "\n")


def read_description(folder: Path) -> dict:
    path = folder / "prior.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no prior (it has no prior.json);"
            f" make one with: vqfast train-prior MODEL DATA --out {folder}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(f"{path} is no description of priors that this vqfast reads ({FORMAT})")
    return settings


def open_both(model_path: str, prior_path: str) -> tuple[torch.nn.Module, CodePrior | HierarchicalPrior, dict]:
    """The model, its prior (all levels) and the prior's description; refused when they do not belong together."""
    model, _, _ = find_model(Path(model_path))
    settings = read_description(Path(prior_path))
    if settings["model"] != model_hash(model.state_dict()):
        raise UserError(
            f"the prior in {prior_path} was trained on another model's codes than {model_path}'s; train one for it"
        )
    folders = [level_folder(Path(prior_path), level) / "model" for level in range(len(settings["shapes"]))]
    missing = [str(f) for f in folders if not f.is_dir()]
    if missing:
        raise UserError(f"the prior is not complete: {', '.join(missing)} is missing; go on with vqfast train-prior")
    levels = [load_pretrained(f) for f in folders]
    return model, levels[0] if len(levels) == 1 else HierarchicalPrior(levels), settings


def class_number(name: str, classes: list[str]) -> int:
    """A class by name or number."""
    if name in classes:
        return classes.index(name)
    if name.isdigit() and int(name) < len(classes):
        return int(name)
    raise UserError(
        f"there is no class {name!r}; there are {', '.join(classes) or 'none: this prior was trained without labels'}"
    )

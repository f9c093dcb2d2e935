"""``vqfast train-prior``: a prior over the codes of a trained model, every level of it, with checkpoints."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqfast._files import write_atomic
from vqfast.cli import UserError
from vqfast.cli._priors import KINDS, level_folder, write_description
from vqfast.data.draws import permutation
from vqfast.models.priors import CodePrior
from vqfast.train import checkpoint as checkpoints
from vqfast.train.config import DataConfig
from vqfast.train.evaluate import encode_pictures
from vqfast.train.ranks import pick_device
from vqfast.train.runs import find_model
from vqfast.train.sources import open_sources

EPILOG = """\
The pictures are encoded once; then each level of codes gets its own prior, the coarsest first, each finer one
conditioned on the level above it. A run that was stopped goes on with the same command and --resume, to the same bits."""


def add_arguments(parser) -> None:
    parser.add_argument("model", help="the model whose codes are to be modelled")
    parser.add_argument(
        "data", help="a folder of pictures, or photographs, cifar10 or mnist (the last two with labels)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the priors")
    parser.add_argument("--kind", choices=KINDS, default="gated", help="network (default: gated, the Gated PixelCNN)")
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--layers", type=int, default=8, help="layers (snail: residual layers per block)")
    parser.add_argument("--labels", action="store_true", help="condition on the data set's classes (cifar10, mnist)")
    parser.add_argument(
        "--size", type=int, default=None, help="side of the square crops, pixels (default: as the model was trained)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps per level")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, default=0, help="use at most so many pictures (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args) -> int:
    out, device = Path(args.out), pick_device(args.device)
    check(args, out)
    model, config, _ = find_model(Path(args.model))
    if not model.quantizers or getattr(model.config, "groups", 1) != 1:
        raise UserError(
            f"{args.model} must be a VQ-VAE or VQ-VAE-2 with one group of codes per level; this one has not"
        )
    model.to(device)
    size = args.size or (config.data.size if config is not None else 32)
    sources = open_sources(DataConfig(source=args.data, size=size), model.config.in_channels)
    labels, classes = labels_of(sources.train, args) if args.labels else (None, [])
    levels = encode_all(model, sources.train, args.limit)
    held_out = encode_all(model, square_only(sources.test, size, sources.test_name), min(args.limit or 512, 512))
    test_labels = labels_of(sources.test, args)[0] if args.labels else None
    write_description(out, model.cpu(), [codes.shape[1:] for codes in levels], classes)
    write_atomic(out / "settings.json", json.dumps(settings_of(args), indent=2) + "\n")
    print(f"{len(levels[0])} pictures, codes {' and '.join('x'.join(map(str, c.shape[1:])) for c in levels)}")
    sizes = [quantizer.codebook_size for quantizer in model.quantizers]
    for depth in reversed(range(len(levels))):
        above = depth + 1 if depth + 1 < len(levels) else None
        prior = make_prior(args, sizes[depth], len(classes), None if above is None else (sizes[above], levels, depth))
        batches = Batches(levels, labels, depth, args, device)
        train_level(prior.to(device), batches, level_folder(out, depth), args)
        tested = Batches(held_out, test_labels, depth, args, device)
        report(prior, tested, depth, levels[depth], sizes[depth], sources.test_name)
    print(f"done. Next:\n  vqfast sample {args.model} {out} samples.png")
    return 0


def check(args, out: Path) -> None:
    for name in ("channels", "layers", "steps", "batch_size", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    before = out / "settings.json"
    if before.exists() and not args.resume:
        raise UserError(f"{out} already holds a run; go on with it by --resume, or choose another folder with --out")
    if args.resume and before.exists():
        old, new = json.loads(before.read_text()), settings_of(args)
        changed = [key for key in new if key != "steps" and old.get(key) != new[key]]
        if changed:
            raise UserError(
                f"--resume goes on with the same settings, but {', '.join(changed)} differ from those in {before}"
            )


def settings_of(args) -> dict:
    keep = (
        "kind",
        "channels",
        "layers",
        "labels",
        "size",
        "steps",
        "batch_size",
        "learning_rate",
        "limit",
        "seed",
        "data",
    )
    return {key: getattr(args, key) for key in keep}


def labels_of(dataset, args) -> tuple[Tensor, list[str]]:
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise UserError(f"{args.data} has no labels; leave out --labels")
    labels = torch.as_tensor(labels).long()
    return labels, [str(i) for i in range(int(labels.max()) + 1)]


def square_only(dataset, size: int, name: str):
    """The held-out set as crops of the training size."""
    if len(dataset) and tuple(dataset[0].shape[1:]) == (size, size):
        return dataset
    return _Crops(dataset, size)


class _Crops:
    def __init__(self, dataset, size: int):
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.dataset[index]
        top, left = ((n - self.size) // 2 for n in picture.shape[1:])
        return picture[:, top : top + self.size, left : left + self.size]


@torch.no_grad()
def encode_all(model: torch.nn.Module, dataset, limit: int, batch: int = 64) -> list[Tensor]:
    """The codes of all pictures, one int64 tensor [N, rows, columns] per level, finest first."""
    count = min(len(dataset), limit) if limit else len(dataset)
    if not count:
        raise UserError("there are no pictures to learn from")
    parts = []
    for begin in range(0, count, batch):
        pixels = torch.stack([dataset[i] for i in range(begin, min(count, begin + batch))])
        parts.append([level.cpu() for level in encode_pictures(model, pixels)[0]])
    return [torch.cat(level) for level in zip(*parts)]


def make_prior(args, codebook_size: int, classes: int, above) -> CodePrior:
    settings = dict(codebook_size=codebook_size, channels=args.channels, layers=args.layers, classes=classes)
    if above is not None:
        size, levels, depth = above
        scale = levels[depth].shape[1] // levels[depth + 1].shape[1]
        settings |= dict(condition_codes=size, condition_scale=scale, condition_channels=args.channels)
    if args.kind == "snail":
        settings |= dict(residual_channels=args.channels, blocks=2)
    torch.manual_seed(args.seed)
    return KINDS[args.kind](**settings)


class Batches:
    """Batch `step` as a pure function of (seed, step): a permutation per epoch, so a resumed run sees what it
    would have seen."""

    def __init__(self, levels: list[Tensor], labels: Tensor | None, depth: int, args, device):
        self.codes, self.labels, self.device, self.args = levels[depth], labels, device, args
        self.above = levels[depth + 1] if depth + 1 < len(levels) else None

    def at(self, step: int) -> tuple:
        count, size = len(self.codes), self.args.batch_size
        rows = np.arange(step * size, (step + 1) * size)
        epochs = {epoch: permutation(count, self.args.seed, int(epoch)) for epoch in np.unique(rows // count)}
        return self.rows(torch.tensor([int(epochs[row // count][row % count]) for row in rows]))

    def rows(self, index: Tensor) -> tuple:
        pick = lambda t: None if t is None else t[index].to(self.device)  # noqa: E731
        return pick(self.codes), pick(self.labels), pick(self.above)


def train_level(prior: CodePrior, batches: Batches, folder: Path, args) -> None:
    """Adam; every checkpoint holds weights, optimizer and the step. The noise of dropout is a function of (seed,
    step) too."""
    optimizer = torch.optim.Adam(prior.parameters(), args.learning_rate)
    start, complaints = checkpoints.load_latest(folder / "checkpoints")
    for complaint in complaints:
        print(complaint)
    step = 0
    if start is not None:
        checkpoints.load_model_tensors(prior, start.tensors, str(folder))
        checkpoints.optimizer_from(optimizer, start.tensors, start.meta)
        step = start.meta["step"]
    prior.train()
    began, first, running = time.monotonic(), step, []
    while step < args.steps:
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = prior.loss(*batches.at(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        step += 1
        running.append(loss.detach())
        if step % args.checkpoint_every == 0 or step == args.steps:
            save(prior, optimizer, folder, step)
            bits = torch.stack(running).mean().item() / math.log(2)
            if not math.isfinite(bits):
                raise UserError(f"the loss is no longer finite at step {step}; resume with a smaller --learning-rate")
            rate = (step - first) / max(time.monotonic() - began, 1e-9)
            print(f"{folder.name} step {step}: {bits:.3f} bits per code, {rate:.1f} steps/s", flush=True)
            running = []
    prior.eval()
    prior.save_pretrained(folder / "model")


def save(prior: CodePrior, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    tensors, meta = checkpoints.optimizer_to(optimizer)
    tensors |= {f"model.{key}": t for key, t in prior.state_dict().items()}
    checkpoints.save_checkpoint(folder / "checkpoints", tensors, {**meta, "step": step}, keep=2)


@torch.no_grad()
def report(prior: CodePrior, batches: Batches, depth: int, codes: Tensor, codebook_size: int, test_name: str) -> None:
    """Held-out bits per code beside what codes cost one by one."""
    parts = [prior.bits_per_code(*batches.rows(index)) for index in torch.arange(len(batches.codes)).split(32)]
    counts = (
        torch.bincount(codes.flatten(), minlength=codebook_size).double() + 1
    )  # every code may occur among the held-out ones
    held = torch.bincount(batches.codes.flatten(), minlength=codebook_size).double()
    unigram = -(held / held.sum() * (counts / counts.sum()).log2()).sum().item()
    mean = torch.cat(parts).mean().item()
    print(
        f"level-{depth}: {mean:.3f} bits per code on {test_name}; by single codes' frequencies {unigram:.3f}, uniform"
        f" {math.log2(codebook_size):.3f}"
    )

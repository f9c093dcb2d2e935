"""The training loop: one class that owns a run, from its folder to its last checkpoint.

A run is a pure function of its configuration: pictures of step n depend on (seed, n) only, and a checkpoint holds
everything else (weights, optimizer, random states, half-filled averages). So a run that was killed at any moment
ends with the same bits as one that was not, with the same number of threads and the same PyTorch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

import vqfast
from vqfast._files import remove_strays, write_atomic
from vqfast.data import Loader
from vqfast.train import checkpoint as checkpoints
from vqfast.train.checkpoint import Checkpoint, CheckpointError
from vqfast.train.config import Config, ConfigError, build_model, to_json
from vqfast.train.log import MetricsLog, Progress, summary_writer
from vqfast.train.ranks import Ranks

Say = Callable[[str], None]


class TrainingError(RuntimeError):
    """Training cannot go on (the loss is not finite, processes disagree); the message says what to try."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it reached, whether a signal stopped it, and its last line of metrics."""

    step: int
    interrupted: bool
    metrics: dict


class Trainer:
    """Trains one model into one folder. Subclasses say on what: they set ``dataset`` in ``_open`` and implement the
    methods under "what is trained".

    Args:
        config: what to train, on what, how long.
        folder: gets ``config.json``, ``metrics.jsonl`` and ``.csv``, ``checkpoints/``, ``pictures/``, ``plots/``
            and, at the end,
            ``model/``.
        ranks: this process among its peers; only the first writes and talks.
        start: the checkpoint to go on from, or None.
        say: prints one line for people.

    Raises:
        ConfigError, CheckpointError: before anything is written. Nor is anything written before the first step is done:
            a start that fails leaves no run behind that would refuse the corrected command.
    """

    def __init__(
        self, config: Config, folder: Path, ranks: Ranks, *, start: Checkpoint | None = None, say: Say = print
    ):
        self.config, self.folder, self.ranks = config, folder, ranks
        self.say: Say = say if ranks.first else (lambda text: None)
        settings = config.train
        if settings.tensorboard:
            summary_writer()  # said now where it is missing, before any work
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.model = build_model(self._training_config()).to(ranks.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self._open()
        torch.manual_seed(
            settings.seed + 1_000_003 * ranks.rank
        )  # weights are the same in all processes, later draws are not
        self.step, self.seconds, self.meter = 0, 0.0, Meter(ranks.device)
        self.log: MetricsLog | None = None
        if start is not None:
            self._restore(start)
        else:
            self._begin()
        self.forward = self.model
        if ranks.world_size > 1:
            self.forward = ranks.parallel(self.model)

    def run(self) -> Outcome:
        """Trains to the last step, or until Ctrl-C or SIGTERM; saves either way.

        Raises:
            TrainingError: the loss, a weight or the optimizer's state is not finite.
        """
        settings, last = self.config.train, {}
        progress = Progress(settings.steps, self.step, self.say, self.ranks.first)
        saved, stop = None, False
        self._clock = time.monotonic()
        with Signals() as signals, self._loader(self.step) as batches:
            while self.step < settings.steps and not stop:
                self._train_step(batches)
                self._open_files()
                self.step += 1
                progress.step()
                end = self.step == settings.steps
                if self.step % settings.log_every == 0 or end:
                    last = self._write_metrics(progress)
                with self._clock_stopped():
                    if settings.picture_every and self.step % settings.picture_every == 0 and not end:
                        self._draw(progress)
                    if settings.checkpoint_every and self.step % settings.checkpoint_every == 0:
                        saved = self._save()
                stop = self.ranks.any(signals.received)
            self._open_files()  # there may have been no step left to do
            if saved != self.step:
                self._save()
        progress.close()
        done = self.step >= settings.steps
        if self.ranks.first:
            self._draw(progress)
            if done:
                self.exported().save_pretrained(self.folder / "model")
            self.log.close()
        for line in self.remarks():
            self.say(line)
        return Outcome(self.step, not done, last or (self.log.lines[-1] if self.ranks.first and self.log.lines else {}))

    def close(self) -> None:
        """Lets go of the data-parallel wrapper; needed before the process group ends, see :meth:`Ranks.release`."""
        if self.forward is not self.model:
            self.forward = self.model
            self.ranks.release()

    @property
    def weights(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    # ---- what is trained ----

    def _training_config(self) -> Config:
        """The configuration that the model is built from in training."""
        return self.config

    def _open(self) -> None:
        """Sets ``dataset``, whose samples the loader draws."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What happens once, before the first step of a new run."""

    def _losses(self, batch: Tensor) -> dict[str, Tensor]:
        """What the model makes of a batch: 0-d tensors; "loss" is minimised, all are logged."""
        raise NotImplementedError

    def _updated(self) -> None:
        """What follows an optimizer step."""

    def describe(self) -> list[str]:
        """Model and data, for people."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """What is to be said at the end."""
        return []

    def draw(self):
        """Writes plots and pictures of this step; returns (name, a Pillow image), or None."""
        raise NotImplementedError

    def exported(self) -> torch.nn.Module:
        """The trained model as its user configured it."""
        return self.model

    # ---- one step ----

    def _train_step(self, batches: Iterator[Tensor]) -> None:
        settings = self.config.train
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for round_ in range(settings.accumulate):
            batch = next_batch(batches).to(self.ranks.device, non_blocking=True)
            silent = self.ranks.world_size > 1 and round_ < settings.accumulate - 1
            with self.forward.no_sync() if silent else contextlib.nullcontext():
                losses = self._losses(batch)
                (losses["loss"] / settings.accumulate).backward()
            self.meter.add(losses, len(batch))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self._updated()

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.train.bf16)

    @contextlib.contextmanager
    def _loader(self, step: int):
        """Batches of one step after the other; batch n of the run is always the same samples."""
        data, settings = self.config.data, self.config.train
        loader = Loader(
            self.dataset,
            data.batch_size,
            seed=settings.seed,
            start_step=step * settings.accumulate,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            workers=data.workers,
        )
        with contextlib.closing(iter(loader)) as batches:
            yield batches

    # ---- what is written ----

    def _open_files(self) -> None:
        """The configuration and the metrics, once, when the first step of this process has shown that it can train."""
        if self.log is not None or not self.ranks.first:
            return
        for place in (self.folder, self.folder / "checkpoints", self.folder / "pictures", self.folder / "plots"):
            remove_strays(place)  # of a run that was killed
        self.log = MetricsLog(self.folder, self.step, self.config.train.tensorboard)
        write_atomic(self.folder / "config.json", to_json(self.config))

    def _write_metrics(self, progress: Progress) -> dict:
        now = time.monotonic()
        self.seconds += now - self._clock
        rate = self.meter.pictures * self.ranks.world_size / max(now - self._clock, 1e-9)
        self._clock = now
        line = {
            "step": self.step,
            **self.meter.means(self.ranks),
            "learning_rate": learning_rate(self.config.train, self.step - 1),
            "pictures_per_second": round(rate, 2),
            "seconds": round(self.seconds, 2),
        }
        self.meter.clear()
        if not math.isfinite(line["loss"]):
            self._stop(f"the loss is {line['loss']}")
        if self.ranks.first:
            self.log.append(line)
            progress.show(line, self.config.train.steps)
        return line

    @contextlib.contextmanager
    def _clock_stopped(self):
        """Time for pictures and checkpoints is no training time."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def _stop(self, reason: str) -> NoReturn:
        kept = checkpoints.list_checkpoints(self.folder / "checkpoints")
        raise TrainingError(
            f"{reason} at step {self.step}, so training stopped. The last checkpoint before is "
            f"{kept[-1].name if kept else 'none'}. Try a smaller train.learning_rate, or train.clip_norm = 1.0"
        )

    def _draw(self, progress: Progress) -> None:
        if not self.ranks.first:
            return
        try:
            if (drawn := self.draw()) is not None:
                self.log.picture(*drawn, self.step)
        except Exception as error:  # whatever hinders a picture, the training is worth more
            progress.note(f"note: the pictures of step {self.step} are missing: {error or type(error).__name__}")

    def _save(self) -> int:
        """Writes a checkpoint of this step; every process takes part."""
        if self.ranks.any(not _finite(self.meter.sums)):
            self._stop("the loss is nan")
        # Adam's averages can overflow while the losses are still finite; no run could go on from that.
        state = [value for entries in self.optimizer.state.values() for value in entries.values()]
        if self.ranks.any(not _finite(*self.model.parameters(), *filter(torch.is_tensor, state))):
            self._stop("a weight or Adam's state is not finite")
        random = {f"random.{rank}": state for rank, state in enumerate(self.ranks.gather(torch.get_rng_state()))}
        if self.ranks.device.type == "cuda":
            states = self.ranks.gather(torch.cuda.get_rng_state(self.ranks.device))
            random |= {f"random.cuda.{rank}": state for rank, state in enumerate(states)}
        self._require_same_weights()
        if self.ranks.first:
            tensors, optimizer = checkpoints.optimizer_to(self.optimizer)
            tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()} | random
            tensors["meter.sums"] = self.meter.sums
            meta = {
                "step": self.step,
                "seconds": self.seconds,
                "meter": self.meter.meta(),
                "optimizer": optimizer,
                "config": self.config.to_dict(),
                "world_size": self.ranks.world_size,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "vqfast": vqfast.__version__,
            }
            checkpoints.save_checkpoint(self.folder / "checkpoints", tensors, meta, keep=self.config.train.keep)
        return self.step

    def _require_same_weights(self) -> None:
        """All processes must hold the same bits; a difference would only grow."""
        if self.ranks.world_size > 1:
            digest = checkpoints.hash_tensors(self.model.state_dict()).encode()
            votes = self.ranks.gather(torch.frombuffer(bytearray(hashlib.sha256(digest).digest()), dtype=torch.uint8))
            if any(not torch.equal(vote, votes[0]) for vote in votes):
                raise TrainingError(
                    f"the processes hold different weights at step {self.step}; this is a bug, please report it"
                )

    def _restore(self, start: Checkpoint) -> None:
        tensors, meta = start
        if meta["world_size"] != self.ranks.world_size:
            raise CheckpointError(
                f"this run was made by {meta['world_size']} processes and can only go on with as many, "
                f"not with {self.ranks.world_size}"
            )
        checkpoints.load_model_tensors(self.model, tensors, "the checkpoint")
        checkpoints.optimizer_from(self.optimizer, tensors, meta["optimizer"])
        torch.set_rng_state(tensors[f"random.{self.ranks.rank}"])
        if self.ranks.device.type == "cuda" and f"random.cuda.{self.ranks.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{self.ranks.rank}"], self.ranks.device)
        self.step, self.seconds = meta["step"], meta["seconds"]
        self.meter.restore(tensors["meter.sums"], meta["meter"])
        for name, here in (("threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if meta[name] != here:
                self.say(
                    f"note: the checkpoint was made with {name} {meta[name]}, here it is {here}; training goes on, "
                    "but its last bits may differ from an uninterrupted run"
                )


class Meter:
    """Running sums of what the model reports; adds on the device, so no step waits for a number."""

    def __init__(self, device: torch.device):
        self.device, self.keys = device, []
        self.clear()

    def clear(self) -> None:
        self.sums, self.rounds, self.pictures = (
            torch.zeros(len(self.keys), dtype=torch.float64, device=self.device),
            0,
            0,
        )

    def add(self, values: dict[str, Tensor], pictures: int) -> None:
        if not self.keys:
            self.keys = list(values)
            self.clear()
        self.sums += torch.stack([value.detach().double() for value in values.values()])
        self.rounds, self.pictures = self.rounds + 1, self.pictures + pictures

    def means(self, ranks: Ranks) -> dict[str, float]:
        means = ranks.mean(self.sums / max(self.rounds, 1)).tolist()
        return {key: round(value, 6) for key, value in zip(self.keys, means, strict=True)}

    def meta(self) -> dict:
        return {"keys": self.keys, "rounds": self.rounds, "pictures": self.pictures}

    def restore(self, sums: Tensor, meta: dict) -> None:
        self.keys, self.rounds, self.pictures = meta["keys"], meta["rounds"], meta["pictures"]
        self.sums = sums.to(self.device)


class Signals:
    """Notes Ctrl-C and SIGTERM instead of dying; a second Ctrl-C ends the process at once."""

    def __enter__(self) -> Signals:
        self.received, self._old = False, {}
        with contextlib.suppress(
            ValueError
        ):  # only the main thread may set handlers; elsewhere signals stay as they are
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def next_batch(batches: Iterator[Tensor]) -> Tensor:
    """The next batch; pictures that cannot be used are the user's to put right."""
    try:
        return next(batches)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def learning_rate(settings, step: int) -> float:
    """The learning rate of the step that starts with ``step`` steps done: a pure function, so nothing of it needs
    saving.
    """
    rate = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup + 1))
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rate

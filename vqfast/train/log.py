"""What a run tells: metrics as JSONL and CSV, progress on the screen, TensorBoard when it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vqfast._files import write_atomic


class MetricsLog:
    """Lines of metrics, appended to ``metrics.jsonl`` and ``metrics.csv``.

    A resumed run cuts both files back to its checkpoint, so no step is there twice and a half-written line disappears.

    Args:
        folder: the run's folder.
        upto: keep the lines of earlier steps up to this one.
        tensorboard: write TensorBoard events into ``folder/tensorboard`` too.
    """

    def __init__(self, folder: Path, upto: int, tensorboard: bool = False):
        self.path = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        self._board = summary_writer()(str(folder / "tensorboard")) if tensorboard else None
        self.lines = [line for line in read_metrics(self.path) if line["step"] <= upto]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        header = [] if not self.lines else [",".join(self.lines[0])]
        write_atomic(self._csv, "".join(text + "\n" for text in [*header, *map(_csv_line, self.lines)]))

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line (``step`` and numbers); the keys are the same in all lines of a run."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with open(self._csv, "a", encoding="utf-8") as file:
            file.write(("" if self.lines else ",".join(line) + "\n") + _csv_line(line) + "\n")
        self.lines.append(dict(line))
        if self._board is not None:
            for key, value in line.items():
                if key != "step":
                    self._board.add_scalar(key, value, line["step"])

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one key, for a chart."""
        return [line["step"] for line in self.lines], [line.get(key, float("nan")) for line in self.lines]

    def picture(self, name: str, image: Any, step: int) -> None:
        """Passes a Pillow image on to TensorBoard."""
        if self._board is not None:
            import numpy as np

            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; one that was cut or damaged is left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def _csv_line(line: Mapping[str, Any]) -> str:
    return ",".join(str(value) for value in line.values())


def summary_writer() -> type:
    """TensorBoard's writer; ImportError, with what to do, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "train.tensorboard is set, but tensorboard is not installed; pip install tensorboard, or --set "
            "train.tensorboard=false"
        ) from None
    return SummaryWriter


class Progress:
    """A tqdm bar on a terminal; plain lines, one per log line, everywhere else.

    Args:
        total: steps in all.
        done: steps that an earlier part of the run made.
        say: prints one line for people.
        shown: False in all processes but the first.
    """

    def __init__(self, total: int, done: int, say: Callable[[str], None], shown: bool = True):
        self._say, self._bar = say, None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, line: Mapping[str, Any], total: int) -> None:
        """Shows one line of metrics."""
        parts = [f"loss {line['loss']:.4f}"]
        parts += [f"reconstruction {line[key]:.4f}" for key in line if key == "reconstruction_loss"]
        parts += [f"{line[key]:.3f} bits per code" for key in line if key == "bits_per_code"]
        parts += [f"{key.replace('_', ' ')} {line[key]:.1f}" for key in line if key.startswith("perplexity")]
        parts += [f"{key.replace('_', ' ')} {line[key]:.0%}" for key in line if key.startswith("usage")]
        parts += [f"{line['pictures_per_second']:.0f} pictures/s"]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts[:-1]))
        else:
            self._say(f"step {line['step']:>6}/{total}  " + "  ".join(parts))

    def note(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

"""End to end with K = 65,536: one VQ-VAE on CIFAR-10, once with vqfast's layer, once with vector-quantize-pytorch's.

    python bench/train_large_codebook.py                 both batch sizes, one thread; about 20 minutes on a shared machine
    python bench/train_large_codebook.py --quick         K = 1,024 and a few steps, into a temporary folder: does it run?
    python bench/train_large_codebook.py --render FILE   the page and the plot again, from a run's JSON
    python bench/train_large_codebook.py --save FOLDER   also save vqfast's trained model there (see make_latents.py)

Each run is a process of its own: the network is trained for a while without a quantizer, gets one whose codes are its outputs
for training pictures, and is trained on. Up to there all runs are the same, and then they see the same pictures in the same
order. (Codes of an untrained encoder would lie in a spot that it leaves within a few steps.) One thread; times are processor
seconds of the training steps with the quantizer, which a busy machine hardly changes, and wall seconds beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from memory import limit_memory, status
from render import STYLES, number, table
from report import ROOT, machine
from torch import Tensor, nn

from vqfast.cli._peers import COMMITMENT, DECAY, LAYERS, indices_of, layers
from vqfast.cli._timing import check_codes
from vqfast.data import CIFAR10, default_folder
from vqfast.models import VQVAE, pixels_to_float
from vqfast.models.presets import CIFAR10_VARIANCE
from vqfast.ops.quantize import Quantized

METHODS = ("vqfast", LAYERS)
ROWS_PER_PICTURE, DIM = 64, 64
LEARNING_RATE = 3e-4
TOLERANCE = 0.01  # runs whose losses differ in the fourth digit reach a level in the same step
WINDOW = 10  # steps over which a loss is averaged
# rows a step -> steps of each method. Theirs take about ten seconds each; ours then go on, to show what the time buys.
PLAN = {2048: {"vqfast": 600, LAYERS: 60}, 16_384: {"vqfast": 60, LAYERS: 60}}
QUICK = {256: {"vqfast": 16, LAYERS: 12}}


class Rows(nn.Module):
    """A layer for rows [B, N, D] in the place of one for pictures [B, D, H, W], with the results that a `VQVAE` reads."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> Quantized:
        b, d, h, w = z.shape
        out = self.layer(z.flatten(2).mT)
        if isinstance(out, Quantized):
            rows, indices, loss = out.quantized, out.indices, out.loss
        else:
            rows, indices, loss = out[0], out[1], out[2].sum()
        zero = loss.new_zeros(())
        return Quantized(rows.mT.reshape(b, d, h, w), indices.view(b, h, w), loss, loss / COMMITMENT, zero, zero, zero, zero)


class Straight(nn.Module):
    """No quantizer: what the network is trained with before it gets one."""

    def forward(self, z: Tensor) -> Quantized:
        zero = z.new_zeros(())
        return Quantized(z, z.new_empty(0), zero, zero, zero, zero, zero, zero)


def batch_of(pixels: Tensor, rows: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10**6 + step)
    return pixels_to_float(pixels[torch.randint(len(pixels), (rows // ROWS_PER_PICTURE,), generator=generator)])


def trained_without(pixels: Tensor, steps: int) -> tuple[VQVAE, torch.optim.Optimizer]:
    """The network and its optimizer after so many steps without a quantizer."""
    torch.manual_seed(0)
    model = VQVAE(codebook_size=1, data_variance=CIFAR10_VARIANCE).train()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    model.quantizer = Straight()
    for _ in timed_steps(model, optimizer, pixels, 2048, range(-steps, 0)):
        pass
    return model, optimizer


@torch.no_grad()
def outputs(model: VQVAE, pixels: Tensor, rows: int) -> Tensor:
    """The encoder's vectors [rows, DIM] for training pictures drawn at random."""
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: rows // ROWS_PER_PICTURE]
    return torch.cat([model._latents(pixels_to_float(part)).movedim(1, -1).flatten(0, -2) for part in pixels[chosen].split(128)])


def train(method: str, rows: int, steps: int, codes: int, warm_up: int, pixels: Tensor) -> tuple[dict, VQVAE]:
    """Trains with one layer; losses and times of every step with it."""
    model, optimizer = trained_without(pixels, warm_up)
    codebook = outputs(model, pixels, codes)
    made = layers(codebook)
    z = codebook[:: max(1, codes // 256)] + 0.01
    chosen = {name: indices_of(made[name], z) for name in METHODS}
    check_codes(chosen["vqfast"], z, codebook)
    agree = float((chosen["vqfast"] == chosen[LAYERS]).double().mean())
    model.quantizer = Rows(made.pop(method))
    del made
    result = {"method": method, "rows": rows, "same codes": agree, "before MiB": status("VmRSS")}
    try:
        loss, cpu, wall = map(list, zip(*timed_steps(model, optimizer, pixels, rows, range(steps)), strict=True))
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return result | {"failed": str(error).splitlines()[0][-200:]}, model
    return result | {"loss": loss, "cpu": cpu, "wall": wall, "peak MiB": status("VmHWM")}, model


def timed_steps(model, optimizer, pixels: Tensor, rows: int, steps: range) -> Iterator[tuple[float, float, float]]:
    """Loss, processor seconds and wall seconds of each training step; `steps` name the batches."""
    for step in steps:
        batch = batch_of(pixels, rows, step)
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        out = model(batch)
        out.loss.backward()
        optimizer.step()
        yield float(out.loss), time.process_time() - cpu, time.perf_counter() - wall


def save(model: VQVAE, folder: Path) -> None:
    """The model with vqfast's layer in its own place, for make_latents.py."""
    layer = model.quantizer.layer
    whole = VQVAE(model.config, codebook_size=layer.codebook_size, decay=DECAY, commitment_weight=COMMITMENT)
    model.quantizer = whole.quantizer
    model.quantizer.load_state_dict(layer.state_dict())
    whole.load_state_dict(model.state_dict())
    whole.save_pretrained(folder)


# ---- the comparison ------------------------------------------------------------------------------------------------


def smooth(values: list[float]) -> list[float]:
    """Mean of each step and the WINDOW - 1 before it; infinite while there are fewer."""
    return [statistics.fmean(values[i - WINDOW + 1 : i + 1]) if i >= WINDOW - 1 else math.inf for i in range(len(values))]


def seconds_to(run: dict, level: float, clock: str) -> float | None:
    """Seconds of training until the smoothed loss first reaches `level`."""
    spent = 0.0
    for loss, step in zip(smooth(run["loss"]), run[clock], strict=True):
        spent += step
        if loss <= level:
            return spent
    return None


def summary(run: dict, level: float) -> dict:
    """What the table shows of one run."""
    step = {clock: statistics.median(run[clock]) for clock in ("cpu", "wall")}
    return {"step": step, "to level": {clock: seconds_to(run, level, clock) for clock in ("cpu", "wall")}}


def loss_after(run: dict, seconds: float) -> float:
    """The smoothed loss of the last step that ends within so many processor seconds."""
    spent, reached = 0.0, math.inf
    for loss, step in zip(smooth(run["loss"]), run["cpu"], strict=True):
        spent += step
        if spent > seconds:
            break
        reached = loss
    return reached


def render(result: dict, source: str, folder: Path) -> None:
    """Writes train_large_codebook.md and .svg from a run's JSON."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    load = f"{m['load average at the start'][0]:.1f} at the start, {m['load average at the end'][0]:.1f} at the end"
    quick = "**A quick run with few codes: it proves the script, not a speed.**\n\n" if result["quick"] else ""
    text = f"""# Measured: training a VQ-VAE with {result["codes"]:,} codes

{quick}{result["date"][:10]}, {m["cpu"]}, {m["threads"]} of {m["cores"]} cores, SIMD level {m["cpu level"]}, load average {load}; {versions};
commit {m["commit"]}. Raw numbers: [{source}]({source}). Again: `python bench/train_large_codebook.py`.

Sonnet's CIFAR-10 network (hidden 128, D = {DIM}), K = {result["codes"]:,}, moving averages {DECAY}, beta {COMMITMENT}, Adam {LEARNING_RATE:g};
a picture gives {ROWS_PER_PICTURE} rows. Each run is a process of its own: {result["warm-up steps"]} steps of 2,048 rows without a quantizer, then one whose
codes are the network's outputs for training pictures; the same up to there, and the same pictures after it. Seconds are processor
seconds of whole training steps with the quantizer (forward, backward, Adam), wall seconds in brackets. The level is the
lowest loss that all runs of a batch size reach, as a mean over {WINDOW} steps, plus {TOLERANCE:.0%}. Before training, vqfast's codes are compared with the float64 oracle. A run
may take {result["memory limit GiB"]} GiB of memory.

{comparison(result)}

![loss against processor seconds](train_large_codebook.svg)
"""
    (folder / "train_large_codebook.md").write_text(text)
    plot(result, folder / "train_large_codebook.svg")


def rows_of(result: dict) -> list[int]:
    return sorted({run["rows"] for run in result["runs"]})


def comparison(result: dict) -> str:
    lines, remarks = [], []
    for rows in rows_of(result):
        runs = {run["method"]: run for run in result["runs"] if run["rows"] == rows}
        done = [run for run in runs.values() if "loss" in run]
        level = (1 + TOLERANCE) * max(min(smooth(run["loss"])) for run in done)
        ours = summary(runs["vqfast"], level)
        for name, run in runs.items():
            lines.append([f"{rows:,} rows a step, {name}", *cells(run, level, ours)])
        if len(done) == 2:
            remarks.append(remark(rows, *done))
    head = ["", "seconds a step", "seconds to the level", "level", "peak MiB", "steps"]
    return "\n\n".join([table(head, lines), *remarks])


def cells(run: dict, level: float, ours: dict) -> list[str]:
    if "failed" in run:
        return ["out of memory", "", "", "", "0"]
    own, times = summary(run, level), []
    for what in ("step", "to level"):
        time_of = f"{number(own[what]['cpu'])} ({number(own[what]['wall'])})"
        times.append(f"{time_of}, {own[what]['cpu'] / ours[what]['cpu']:.1f}x" if run["method"] != "vqfast" else f"**{time_of}**")
    return [*times, f"{level:.4f}", f"{run['peak MiB']:,.0f}", str(len(run["loss"]))]


def remark(rows: int, ours: dict, theirs: dict) -> str:
    apart = max(abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=False))
    total = sum(theirs["cpu"])
    return (
        f"{rows:,} rows a step: on the steps that both ran the losses differ by at most {apart:.1e}. In the {number(total)} s that"
        f" {LAYERS} took for {len(theirs['loss'])} steps (loss {smooth(theirs['loss'])[-1]:.4f} at the end) vqfast's loss falls to"
        f" {loss_after(ours, total):.4f}."
    )


def plot(result: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vqfast"
    from matplotlib import pyplot

    sizes = rows_of(result)
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.2), layout="constrained", squeeze=False)
    colours = {"vqfast": STYLES["vqfast"][0], LAYERS: "#0072B2"}
    for panel, rows in zip(panels[0], sizes, strict=True):
        for run in (run for run in result["runs"] if run["rows"] == rows and "loss" in run):
            spent = torch.tensor(run["cpu"]).cumsum(0)
            panel.semilogx(spent[WINDOW - 1 :], smooth(run["loss"])[WINDOW - 1 :], color=colours[run["method"]], label=run["method"])
        panel.set(title=f"{rows:,} rows a step", xlabel=f"processor seconds, threads: {result['machine']['threads']}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0][0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"VQ-VAE on CIFAR-10, K = {result['codes']:,}")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def in_own_process(args, method: str, *numbers: int) -> dict:
    command = [sys.executable, __file__, "--pictures", str(args.pictures), "--threads", str(args.threads)]
    command += ["--memory-gib", str(args.memory_gib), *(["--save", str(args.save)] if args.save else [])]
    command += ["--one", method, *map(str, numbers)]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{method} {numbers} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    """Yields the growing result after each run, so that one that is stopped leaves what it has."""
    codes, warm_up, plan = (1024, 5, QUICK) if args.quick else (65_536, 100, PLAN)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    result = {"date": date, "quick": args.quick, "codes": codes, "warm-up steps": warm_up, "runs": []}
    result |= {"memory limit GiB": args.memory_gib, "machine": machine()}
    for rows, steps in plan.items():
        for method in METHODS:
            run = in_own_process(args, method, rows, steps[method], codes, warm_up)
            result["runs"].append(run)
            said = run.get("failed") or f"{statistics.median(run['cpu']):.3f} s a step"
            print(f"{method}, {rows} rows a step: {said}", flush=True)
            result["machine"]["load average at the end"] = list(os.getloadavg())
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pictures", type=Path, default=default_folder("cifar10"), help="CIFAR-10's binary files")
    parser.add_argument("--out", type=Path, help="folder; default docs/results, or a temporary one with --quick")
    parser.add_argument("--save", type=Path, help="folder for the model that vqfast's layer was trained in")
    parser.add_argument("--memory-gib", type=int, default=12, help="that a run may take; N x K matrices may need more")
    parser.add_argument("--render", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=5, metavar=("METHOD", "ROWS", "STEPS", "CODES", "WARM_UP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        limit_memory(args.memory_gib)
        method, (rows, steps, codes, warm_up) = args.one[0], map(int, args.one[1:])
        result, model = train(method, rows, steps, codes, warm_up, CIFAR10(args.pictures, check=False).pixels)
        if args.save and method == "vqfast":
            save(model, args.save / f"rows_{rows}")
        return print(json.dumps(result))
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.out or args.render.parent)
    out = args.out or (Path(tempfile.mkdtemp(prefix="vqfast-train-")) if args.quick else ROOT / "docs/results")
    out.mkdir(parents=True, exist_ok=True)
    for result in measure(args):
        file = out / f"train_large_codebook_{result['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        render(result, file.name, out)
    print(out / "train_large_codebook.md")


if __name__ == "__main__":
    main()

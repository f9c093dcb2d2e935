"""The measured tables of docs/results/search.md, in one run of under 8 minutes on a quiet machine.

    python bench/report.py                 everything, with two threads
    python bench/report.py --quick         small shapes, few rounds, into a temporary folder: does it run?
    python bench/report.py --render FILE   the page and the plot again, from a run's JSON

Ours and theirs take turns in one process; medians after warm-up. Each result of vqfast is compared with the float64
oracle first, and a wrong code ends the run. Our times start from the bare codebook: they include whatever the search
builds from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from latents import load_residual_codes
from memory import peak_mib
from render import render
from shapes import ISOTROPIC, LATENTS, Shape, both

import vqfast
from vqfast import _backends
from vqfast.cli._peers import CDIST, EXPANDED, FAISS, indices_of, installed, layers, searches, training_step
from vqfast.cli._timing import check_codes, in_turns
from vqfast.cli.bench import check_layer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
LARGE = 8192  # codes; beyond, fewer rounds and fewer rows checked


def machine(*packages: str) -> dict:
    """The conditions of a run: without them its numbers mean nothing. `packages`: more of which the version matters."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    versions = {"torch": torch.__version__, "vqfast": vqfast.__version__}
    for name in ("faiss-cpu", "vector-quantize-pytorch", *packages):
        versions[name] = _version(name)
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cpu level": _backends.cpu_level(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed files": [line[3:] for line in _git("status", "--porcelain", "--untracked-files=no").splitlines()],
        "load average at the start": list(os.getloadavg()),
    }


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(*words: str) -> str:
    # The leading blank of a status line matters, so only the end is stripped.
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.rstrip()


def measure_searches(shapes: list[Shape], rounds: int) -> list[dict]:
    found = []
    for shape in shapes:
        if not shape.available():
            found.append(
                {"shape": shape.name, "left out": "its codebook is not on this machine (bench/make_latents.py)"}
            )
            continue
        x, codebook = shape.load()
        work = searches(x, codebook)
        if shape.codes > LARGE:
            del work[EXPANDED]  # 4 GiB of scores a call; the compiled one stands for both
        ours = work["vqfast"]()
        checked = len(x) if shape.codes <= LARGE else 2048
        check_codes(ours, x, codebook, sample=checked)
        same = {name: float((call() == ours).double().mean()) for name, call in work.items()}
        # Seconds a call beyond LARGE: three rounds hold the run under its 8 minutes.
        times = in_turns(work, rounds if shape.codes <= LARGE else min(rounds, 3), CPU)
        entry = {
            "shape": shape.name,
            "data": shape.data,
            "rows": shape.rows,
            "codes": shape.codes,
            "rows checked": checked,
        }
        found.append(entry | {"ms": times, "same codes": same})
        print(f"{shape.name}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in times.items()), flush=True)
    return found


def measure_steps(shapes: list[tuple[Shape, int]], rounds: int) -> list[dict]:
    """Training steps of (shape, levels); levels 0 is the plain layer."""
    found = []
    for shape, levels in shapes:
        x, codebook = shape.load()
        if levels:
            codebook = load_residual_codes()[:levels, : shape.codes].contiguous()
        made = layers(codebook)
        check_layer(indices_of(made["vqfast"], x), x, codebook)
        times = in_turns({name: lambda n=n, x=x: training_step(n, x) for name, n in made.items()}, rounds, CPU)
        found.append({"data": shape.data, "rows": shape.rows, "codes": shape.codes, "levels": levels, "ms": times})
        print(
            f"training step, {shape.name}, levels {levels}: " + ", ".join(f"{n} {ms:.1f}" for n, ms in times.items()),
            flush=True,
        )
    return found


def measure_memory(shapes: list[Shape]) -> list[dict]:
    found = []
    for shape in shapes:
        if shape.available():
            mib = {
                method: peak_mib(method, shape)
                for method in ("vqfast", CDIST, FAISS)
                if method != FAISS or installed("faiss")
            }
            found.append({"data": shape.data, "rows": shape.rows, "codes": shape.codes, "MiB": mib})
            print(f"peak extra MiB, {shape.name}: " + ", ".join(f"{n} {m:.0f}" for n, m in mib.items()), flush=True)
    return found


def measure(quick: bool, rounds: int):
    """Yields the growing result after each section, so that a run that is stopped leaves what it has."""
    rows = 512 if quick else 16_384
    sizes, largest = ((512,), 1024) if quick else ((512, 1024, 8192), 65_536)
    step = 1024 if quick else 8192
    begin = time.perf_counter()
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    result = {"date": date, "quick": quick, "rounds": rounds, "machine": machine()}
    result |= {"search": [], "training step": [], "memory": []}
    steps = [(Shape(LATENTS, rows, step), 0), (Shape(ISOTROPIC, rows, step), 0), (Shape(LATENTS, rows, 1024), 8)]
    sections = [
        ("search", lambda: measure_searches([shape for size in sizes for shape in both(rows, size)], rounds)),
        ("training step", lambda: measure_steps(steps, min(rounds, 5))),
        ("memory", lambda: measure_memory(both(rows, largest))),
        ("search", lambda: measure_searches(both(rows, largest), rounds)),
    ]
    for name, section in sections:
        result[name] += section()
        result["machine"]["load average at the end"] = list(os.getloadavg())
        result["seconds"] = round(time.perf_counter() - begin)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default 7, and 2 with --quick")
    parser.add_argument("--out", type=Path, help="folder; default docs/results, or a temporary one with --quick")
    parser.add_argument("--render", type=Path, metavar="FILE")
    args = parser.parse_args()
    out = args.out or (Path(tempfile.mkdtemp(prefix="vqfast-report-")) if args.quick else ROOT / "docs/results")
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.out or args.render.parent)
    torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    for result in measure(args.quick, args.rounds or (2 if args.quick else 7)):
        file = out / f"search_{result['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        render(result, file.name, out)
    print(f"{out / 'search.md'}; {result['seconds']} s")


if __name__ == "__main__":
    main()

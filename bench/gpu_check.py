"""Everything that only a GPU can show, in one call of at most 8 minutes: correctness first, then speed.

    python bench/gpu_check.py                     all sections, or those that a stopped run left over
    python bench/gpu_check.py --sections suite nearest
    python bench/gpu_check.py --fresh             forget what is in the result file
    python bench/gpu_check.py --list

A CUDA library that is missing is built first, for the GPU at hand. Every section is written to the result file,
docs/results/gpu_<device>_<date>.json, when it ends, and a rerun at the same commit continues with the missing ones; a file of another commit
is set aside under a name with that commit. The plots are drawn from the file, as .svg beside it. A speed section first checks its results and
prints no number when they are wrong. Without a GPU the same code runs on the CPU with small shapes, Triton in its interpreter, and says so in
the file: that proves the script, not a kernel.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]


def build_library(on_gpu: bool) -> str:
    """The CUDA library in words; built for this GPU where it is missing. Comes before vqfast, which loads it when it is imported."""
    found = importlib.util.find_spec("vqfast")
    library = Path(found.origin).with_name("_C_cuda.so")
    if library.exists():
        return "found"
    if not on_gpu or library.parent != ROOT / "vqfast":
        return "none" if not on_gpu else f"none in {library.parent}, which is not this checkout"
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "VQFAST_BUILD": "cuda", "VQFAST_CUDA_ARCHS": f"{major}{minor}" + "a" * (major == 9)}
    started = time.monotonic()
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "not built within 240 s; build it beforehand (VQFAST_BUILD=cuda pip install --no-build-isolation -e .)"
    if done.returncode:
        return f"not built: {(done.stderr or done.stdout).strip()[-500:]}"
    return f"built in {time.monotonic() - started:.0f} s"


CUDA_LIBRARY = "none" if "--list" in sys.argv else build_library(ON_GPU)

from gpu import checks, convolutions, plots, speed  # noqa: E402

# Most important first: when time runs out, what is missing is at the end.
SECTIONS = {
    "small": checks.small,
    "suite": checks.suite,
    "graphs": checks.graphs,
    "streams": checks.streams,
    "beyond_32_bits": checks.beyond_32_bits,
    "determinism": checks.determinism,
    "nearest": speed.nearest,
    "statistics": speed.statistics,
    "training_step": speed.training_step,
    "masked_conv": convolutions.masked_conv,
    "certificates": speed.certificates,
    "microbenchmarks": checks.microbenchmarks,
    "sanitizer": checks.sanitizer,
}


def command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def facts() -> dict:
    """What the numbers depend on."""
    found = {
        "device": torch.cuda.get_device_name() if ON_GPU else "no GPU: CPU and Triton's interpreter",
        "on_gpu": ON_GPU,
        "commit": command("git", "rev-parse", "HEAD") or "unknown",
        "changed_files": len(command("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_library": CUDA_LIBRARY,
    }
    for module in ("triton", "numpy", "vqfast"):
        try:
            found[module] = __import__(module).__version__
        except ImportError:
            found[module] = None
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        query = "driver_version,clocks.max.sm,clocks.max.mem"
        found["driver_and_clocks"] = command("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return found


def default_path(about: dict) -> Path:
    device = "".join(c if c.isalnum() else "_" for c in about["device"].split(":")[0]).strip("_").lower()
    folder = ROOT / "docs" / "results" if about["on_gpu"] else Path(os.environ.get("TMPDIR", "/tmp"))
    return folder / f"gpu_{device}_{datetime.date.today().isoformat()}.json"


def load(path: Path, about: dict, fresh: bool) -> dict:
    """The result file to go on with; a new one when the old was written at another commit or on another device, which then keeps its numbers
    under a name of its own: two commits are often measured on one day."""
    if path.exists() and not fresh:
        result = json.loads(path.read_text())
        same = all(result["facts"].get(key) == about[key] for key in ("device", "commit", "torch", "triton"))
        if same:
            return result
        label = f"{result['facts'].get('commit', 'unknown')[:8]}_{result['date']}".replace(":", "")
        aside = path.with_name(f"{path.stem}_{label}{path.suffix}")
        path.replace(aside)
        print(f"{path.name} is of another commit, device or version: kept as {aside.name}")
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "facts": about, "sections": {}}


def save(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def run_section(name: str, seconds_left: float) -> dict:
    started = time.monotonic()
    try:
        outcome = SECTIONS[name](ON_GPU, time.monotonic() + seconds_left)
    except Exception as error:
        outcome = {"state": "failed", "why": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-2000:]}
    return {"state": "passed", **outcome, "seconds": round(time.monotonic() - started, 1)}


def table(rows: list[dict]) -> str:
    """Aligned columns; the union of the rows' keys, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[f"{row.get(key, '')}" for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="result file; by default docs/results/gpu_<device>_<date>.json")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds after which no section is started (default 460)")
    parser.add_argument("--fresh", action="store_true", help="run sections again that the file already holds")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:16s}{function.__doc__.splitlines()[0]}" for name, function in SECTIONS.items()))
        return 0
    about = facts()
    path = options.out or default_path(about)
    result = load(path, about, options.fresh)
    if not about["on_gpu"]:
        print("No GPU: this proves that the script runs. Its times are those of an interpreter and mean nothing.")
    print(f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, commit {about['commit'][:12]} -> {path}")
    print(f"CUDA library: {about['cuda_library']}")
    stop = time.monotonic() + options.limit
    for name in options.sections:
        if result["sections"].get(name, {}).get("state") in ("passed", "skipped"):
            print(f"{name}: in the file already ({result['sections'][name]['state']})")
            continue
        left = stop - time.monotonic()
        if left <= 0:
            print(f"{name}: no time left; run the script again")
            continue
        outcome = run_section(name, left)
        result["sections"][name] = outcome
        save(path, result)
        print(f"{name}: {outcome['state']} in {outcome['seconds']} s" + (f": {outcome['why']}" if "why" in outcome else ""), flush=True)
        if outcome.get("rows"):
            print(table(outcome["rows"]), flush=True)
    if plots.draw(result, path.with_suffix(".svg")):
        print(f"plots: {path.with_suffix('.svg')}")
    states = [section["state"] for section in result["sections"].values()]
    missing = [name for name in options.sections if name not in result["sections"]]
    print(f"{states.count('passed')} passed, {states.count('failed')} failed, {states.count('skipped')} skipped, {len(missing)} missing")
    return 1 if "failed" in states or missing else 0


if __name__ == "__main__":
    sys.exit(main())

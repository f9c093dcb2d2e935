"""Everything that only a GPU can show, in one call of at most 8 minutes: correctness first, then speed.

    python -m pip install --no-build-isolation --no-deps -e .     first; --no-index too where nothing can be fetched
    python bench/gpu_check.py                     all sections, or those that a stopped run left over
    python bench/gpu_check.py --sections small nearest
    python bench/gpu_check.py --fresh             forget what is in the result file
    python bench/gpu_check.py --list

The CUDA library is built for the GPU at hand, unless it is there and up to date. Every section runs in a process of its own, one for each
backend where it is about one backend, so that neither an error nor a hang takes anything else along. It is written to the result file,
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
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

START = time.monotonic()  # what the library's build takes is part of the limit
SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]


def build_library(on_gpu: bool) -> str:
    """The CUDA library in words, built for this GPU where it is missing or older than its sources. Comes before vqfast, which loads it when
    it is imported.
    """
    found = importlib.util.find_spec("vqfast")
    if found is None:
        sys.exit("vqfast is not installed: run 'python -m pip install --no-build-isolation --no-deps -e .' in the checkout first, with"
                 " --no-index too where nothing can be fetched")  # fmt: skip
    library = Path(found.origin).with_name("_C_cuda.so")
    if not on_gpu or library.parent != ROOT / "vqfast":
        whose = "" if library.parent == ROOT / "vqfast" else f" in {library.parent}, which is not this checkout"
        return ("found" if library.exists() else "none") + whose
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "VQFAST_BUILD": "cuda", "VQFAST_CUDA_ARCHS": f"{major}{minor}" + "a" * (major == 9)}
    environment["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])  # where toolkits install themselves
    started = time.monotonic()
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "not built within 240 s; build it beforehand (VQFAST_BUILD=cuda pip install --no-build-isolation -e .)"
    if done.returncode:
        return f"not built: {(done.stderr or done.stdout).strip()[-500:]}"
    return f"built or up to date in {time.monotonic() - started:.0f} s"


CHILD = "--one" in sys.argv  # a process of a single section: what its parent has seen to is done
CUDA_LIBRARY = "" if CHILD else build_library(ON_GPU and "--list" not in sys.argv)

from gpu import checks, convolutions, plots, speed  # noqa: E402

from vqfast import _backends  # noqa: E402


@dataclass(frozen=True)
class Section:
    """A function of (on_gpu, deadline); with a family also of the name of a backend, once for each that has that family."""

    function: Callable[..., dict]
    family: str = ""
    starts_processes: bool = False  # of its own, so that it needs none
    most: float = 120.0  # seconds, so that one that hangs leaves the others theirs


# Most important first: when time runs out, what is missing is at the end.
SECTIONS = {
    "small": Section(checks.small, "nearest"),
    "suite_cuda": Section(checks.suite_cuda, starts_processes=True, most=240.0),
    "suite_triton": Section(checks.suite_triton, starts_processes=True, most=240.0),
    "graphs": Section(checks.graphs, "quantize"),
    "streams": Section(checks.streams, "nearest"),
    "beyond_32_bits": Section(checks.beyond_32_bits, "nearest"),
    "determinism": Section(checks.determinism, "quantize"),
    "nearest": Section(speed.nearest),
    "statistics": Section(speed.statistics),
    "training_step": Section(speed.training_step),
    "masked_conv": Section(convolutions.masked_conv),
    "certificates": Section(speed.certificates),
    "microbenchmarks": Section(checks.microbenchmarks),
    "sanitizer": Section(checks.sanitizer, starts_processes=True, most=400.0),
}


def command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def why_not(backend: str, family: str = "nearest") -> str:
    return "; ".join(_backends.reasons(family, backend, torch.empty(0, device="cuda" if ON_GPU else "cpu")))


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
        "cannot run": {name: why for name in ("cuda", "triton") if (why := why_not(name))},
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


def attempt(section: Section, seconds: float, *backend: str) -> dict:
    """The section's outcome, in this process."""
    try:
        return section.function(ON_GPU, time.monotonic() + seconds, *backend)
    except Exception as error:
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"[:2000], "where": traceback.format_exc()[-2000:]}


def in_process(name: str, seconds: float, *backend: str) -> dict:
    """The section's outcome, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        words = [sys.executable, "-W", "ignore", str(SCRIPT), "--one", name, *backend, "--limit", str(seconds), "--out", str(out)]
        log = Path(folder) / "log"
        with log.open("w") as to:  # no pipe, which what the process leaves behind would keep open
            try:
                why = f"its process ended with {subprocess.run(words, stdout=to, stderr=to, timeout=seconds + 15).returncode}"
            except subprocess.TimeoutExpired:
                why = f"not finished after {seconds:.0f} s"
        try:
            return json.loads(out.read_text())
        except (OSError, ValueError):  # not written, or not to its end
            return {"state": "failed", "why": why, "where": log.read_text(errors="replace")[-2000:]}


def of_all_backends(outcomes: dict[str, dict]) -> dict:
    """One outcome of several backends': failed if any is, skipped if all are."""
    states = [outcome["state"] for outcome in outcomes.values()]
    state = "failed" if "failed" in states else "passed" if "passed" in states else "skipped"
    rows = [row for outcome in outcomes.values() for row in outcome.get("rows", [])]
    told = [(f"{name}: " if state == "failed" else "", outcome["why"]) for name, outcome in outcomes.items() if "why" in outcome]
    whys = dict.fromkeys(name + why for name, why in told)
    where = "\n".join(outcome["where"] for outcome in outcomes.values() if "where" in outcome)
    return {"state": state, **({"why": "; ".join(whys)} if whys else {}), **({"where": where} if where else {}), "rows": rows}


def run_section(name: str, seconds: float) -> dict:
    started, section = time.monotonic(), SECTIONS[name]
    seconds = min(seconds, section.most)
    if section.starts_processes:
        outcome = attempt(section, seconds)
    elif section.family:
        outcomes = {}
        for backend in ("cuda", "triton"):
            if why := why_not(backend, section.family):
                if ON_GPU:  # there both are meant to run
                    outcomes[backend] = {"state": "failed", "why": f"cannot run: {why}"}
                continue
            outcomes[backend] = in_process(name, seconds / 2, backend)
        outcome = of_all_backends(outcomes) if outcomes else checks.skipped("neither Triton nor the CUDA library can run here")
    else:
        outcome = in_process(name, seconds)
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
    parser.add_argument("--commit", help="what the results are of, where there is no git to ask")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # a section, and a backend: only its outcome is written
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:16s}{section.function.__doc__.splitlines()[0]}" for name, section in SECTIONS.items()))
        return 0
    if options.one:
        name, *backend = options.one
        options.out.write_text(json.dumps(attempt(SECTIONS[name], options.limit, *backend)))
        return 0
    about = facts() | ({"commit": options.commit} if options.commit else {})
    path = options.out or default_path(about)
    result = load(path, about, options.fresh)
    if not about["on_gpu"]:
        print("No GPU: this proves that the script runs. Its times are those of an interpreter and mean nothing.")
    print(f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, commit {about['commit'][:12]} -> {path}")
    print(f"CUDA library: {about['cuda_library']}", *(f"{name} cannot run: {why}" for name, why in about["cannot run"].items()), sep="\n")
    stop = START + options.limit
    # What failed before comes last: it may have taken the time of those that are missing.
    for name in sorted(options.sections, key=lambda name: name in result["sections"]):
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
        for line in outcome.get("failures", [])[:40]:
            print(f"    {line}", flush=True)
    try:
        if plots.draw(result, path.with_suffix(".svg")):
            print(f"plots: {path.with_suffix('.svg')}")
    except Exception as error:  # the numbers are in the file
        print(f"no plots: {type(error).__name__}: {error}")
    states = [section["state"] for section in result["sections"].values()]
    missing = [name for name in options.sections if name not in result["sections"]]
    print(f"{states.count('passed')} passed, {states.count('failed')} failed, {states.count('skipped')} skipped, {len(missing)} missing")
    return 1 if "failed" in states or missing else 0


if __name__ == "__main__":
    sys.exit(main())

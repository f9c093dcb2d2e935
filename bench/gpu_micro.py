"""Microbenchmarks of the GPU at hand, and the latency of nearest for few rows in a replayed graph.

    python bench/gpu_micro.py       needs a CUDA GPU and nvcc; bench/gpu_check.py calls it too

gpu_micro.cu is compiled for this GPU and run: rates of the instructions that the searches' epilogues are made of, alone and beside wgmma; how
tensor cores add, which the float16 screens take for granted; launches in a graph; clusters; sums by code under skew.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("gpu_micro.cu")
ALLOWED = 18.0  # tensor_core_bound of csrc/cuda/bounds.cuh, in units of 2^-23 a step


def microbenchmarks(on_gpu: bool, deadline: float) -> dict:
    """Single instructions beside wgmma, tensor cores' additions, launches, clusters, sums under skew, few rows: as gpu_check's sections.

    Args:
        on_gpu: False gives a skipped section.
        deadline: time.monotonic() after which nothing more is started.
    """
    if not on_gpu:
        return {"state": "skipped", "why": "microbenchmarks need a GPU"}
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        return {"state": "skipped", "why": "microbenchmarks need nvcc: put it on PATH, or set NVCC"}
    rows = measured(nvcc.split(), deadline) + few_rows()
    return {**verdict(rows), "rows": rows}


def command(nvcc: list[str], target: Path, arch: str) -> list[str]:
    """The compiler call for one architecture, such as "90a"."""
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    return [*nvcc, *flags, str(SOURCE), "-o", str(target)]


def measured(nvcc: list[str], deadline: float) -> list[dict]:
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "gpu_micro"
        arch = f"{major}{minor}" + "a" * (major == 9)
        for words in (command(nvcc, program, arch), [str(program)]):
            done = subprocess.run(words, capture_output=True, text=True, timeout=max(10.0, deadline - time.monotonic()))
            if done.returncode:
                raise RuntimeError(f"{Path(words[0]).name} failed: {(done.stderr or done.stdout)[-1500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def few_rows() -> list[dict]:
    """Device time of nearest, N = 1,024, K = 4,096, D = 256, in a replayed graph: by the default search, and by that for few rows."""
    import vqfast
    from gpu.speed import encoder_rows

    x, codebook = encoder_rows(1024, 4096, 256, seed=256, on_gpu=True)
    if vqfast._backends.reasons("nearest", "cuda", x):
        return []
    library = ctypes.CDLL(str(Path(vqfast.__file__).with_name("_C_cuda.so")))
    expected = vqfast.nearest(x.cpu(), codebook.cpu(), backend="reference").indices
    rows = []
    for name, allow in (("default search", 0), ("search for few rows", 1)):
        before = library.vqfast_cuda_few_rows_allow(allow)
        try:
            graph, found = captured(lambda: vqfast.nearest(x, codebook, backend="cuda").indices)
        finally:
            library.vqfast_cuda_few_rows_allow(before)
        wrong = int((found.cpu() != expected).sum())
        what = f"nearest N = 1,024, K = 4,096, D = 256, float32, graph replay, {name}"
        if wrong:
            rows.append({"what": f"{what}: wrong codes", "value": wrong, "unit": "rows"})
        else:
            rows.append({"what": what, "value": round(replayed(graph), 2), "unit": "us"})
    return rows


def captured(call):
    """A graph of `call`, replayed once, and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    return graph, result


def replayed(graph, replays: int = 20, repeats: int = 11) -> float:
    """Median microseconds of one replay, by events around `replays` of them."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / replays)
    return statistics.median(times)


def verdict(rows: list[dict]) -> dict:
    """Failed where a search was wrong, or where tensor cores err by more than the float16 screens' bounds take for granted."""
    wrong = [row["what"] for row in rows if row["unit"] == "rows" and row["value"]]
    wrong += [f"{row['what']}, found {row['value']:.1f}" for row in rows if "largest error" in row["what"] and not row["value"] <= ALLOWED]
    return {"state": "failed", "why": "; ".join(wrong)} if wrong else {"state": "passed"}


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]
    outcome = microbenchmarks(torch.cuda.is_available(), time.monotonic() + 460)
    for row in outcome.get("rows", []):
        print(f"{row['value']:>12.5g} {row['unit']:<24}{row['what']}")
    print(outcome["state"] + (f": {outcome['why']}" if "why" in outcome else ""))
    return int(outcome["state"] == "failed")


if __name__ == "__main__":
    sys.exit(main())

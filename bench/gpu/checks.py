"""Sections that ask whether results are right. Each takes (on_gpu, deadline) and returns what goes into the result file; those that take
the name of a backend as well are about that one alone, so that what one does cannot hide the other.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cases
import oracle
import torch

import vqfast
from vqfast import _backends

ROOT = Path(__file__).resolve().parents[2]


def device(on_gpu: bool) -> torch.device:
    return torch.device("cuda" if on_gpu else "cpu")


def backends(on_gpu: bool, family: str = "nearest") -> list[str]:
    """The GPU backends that can run here; without a GPU Triton's interpreter, where Triton is installed."""
    probe = torch.empty(0, device=device(on_gpu))
    names = ("triton", "cuda") if on_gpu else ("triton",)
    return [name for name in names if not _backends.reasons(family, name, probe)]


def skipped(why: str) -> dict:
    return {"state": "skipped", "why": why}


def verdict(*rows: dict) -> dict:
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": list(rows)}


def small(on_gpu: bool, deadline: float, name: str) -> dict:
    """Each backend against the oracle on adversarial data: the first minute on a new device."""
    builds, wrong = cases.NEAREST if on_gpu else cases.NEAREST[::6], []
    for build in builds:
        for metric in ("l2", "cosine", "dot"):
            x, codebook = build()
            expected = oracle.nearest(x, codebook, metric)
            try:
                got = vqfast.nearest(x.to(device(on_gpu)), codebook.to(device(on_gpu)), metric=metric, backend=name)
            except Exception as error:
                wrong.append(f"{build.__name__} {metric} {type(error).__name__}: {error}"[:300])
                continue
            if not torch.equal(got.indices.cpu(), expected.indices):
                wrong.append(f"{build.__name__} {metric} index")
            elif not torch.equal(got.distance.cpu().nan_to_num(-7.0), expected.distance.nan_to_num(-7.0)):
                wrong.append(f"{build.__name__} {metric} distance")
    return verdict({"backend": name, "cases": 3 * len(builds), "wrong": len(wrong), "which": ", ".join(wrong[:5])})


def suite_cuda(on_gpu: bool, deadline: float) -> dict:
    """The tests of the CUDA backend by pytest: its own, one process for each search, then the op suite."""
    if not on_gpu:
        return skipped("needs a GPU; tests/cuda runs the kernels on a CPU executor")
    own = str(ROOT / "tests" / "cuda" / "test_gpu.py")
    searches = ("float32 screen", "few rows", "Hopper screen")
    rest = {"no search": [own, "-k", " and ".join(f"not ({search})" for search in map(_keyword, searches))]}
    here = searches if torch.cuda.get_device_capability()[0] == 9 else searches[:2]
    runs = {search: [own, "-k", _keyword(search)] for search in here} | rest
    runs["op suite"] = [str(ROOT / "tests" / "ops"), "-k", "cuda and not triton"]
    return _suite(runs, deadline, "cuda")


def suite_triton(on_gpu: bool, deadline: float) -> dict:
    """The tests of the Triton backend by pytest: the op suite and those of its kernels."""
    if not backends(on_gpu):
        return skipped("Triton cannot run here")
    ops = ROOT / "tests" / "ops"
    if not on_gpu:  # the tests of one op prove the section
        return _suite({"op suite": [str(ops / "test_gather.py"), "-k", "triton and (test_groups or test_every_hole)"]}, deadline, "triton")
    kernels = [str(path) for path in (ROOT / "tests" / "kernels").glob("test_interpreted*.py")]
    return _suite({"op suite": [str(ops), "-k", "triton"], "kernels": kernels}, deadline, "triton")


def _keyword(search: str) -> str:
    """What pytest's -k finds the tests of a search by."""
    return " and ".join(search.split())


def _suite(runs: dict[str, list[str]], deadline: float, required: str) -> dict:
    """Runs pytest once for each of `runs`, so that a test which takes its process or the GPU's context with it spares the others."""
    rows, failures = [], []
    for i, (what, words) in enumerate(runs.items()):
        left = (deadline - time.monotonic()) / min(2, len(runs) - i)  # so that one that hangs leaves the others some
        if left < 10:
            rows.append({"what": what, "passed": 0, "failed": 0, "ended": "no time left"})
            continue
        row, failed = _pytest(words, left, required)
        rows.append({"what": what, **row})
        failures += failed
    right = all(row["ended"] == "0" and row["passed"] for row in rows)  # a suite that skipped everything shows nothing
    return {"state": "passed" if right else "failed", "rows": rows, "failures": failures}


def _pytest(words: list[str], limit: float, required: str) -> tuple[dict, list[str]]:
    """How many tests passed and failed, how the process ended, and what failed; what ran until then where it did not end."""
    start = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", "-rf"]
    if importlib.util.find_spec("pytest_timeout"):
        start += ["--timeout=90", "--timeout-method=thread"]
    if importlib.util.find_spec("xdist") and torch.cuda.is_available():
        start += ["-n", str(max(2, (os.cpu_count() or 4) - 2))]  # most of the time goes into compiling kernels
    # Without a GPU the tests would run one in sixteen of these, for their time.
    environment = {**os.environ, "VQFAST_TEST_INTERPRETER": "1", "VQFAST_REQUIRE": required}
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run([*start, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
            ended = str(done.returncode)
        except subprocess.TimeoutExpired:
            ended = f"not within {limit:.0f} s"
        log.seek(0)
        lines = log.read().split("short test summary info")[0].splitlines()
    states = [(found[1], line) for line in lines if "::" in line and (found := re.search(r"(?:^|\s)(PASSED|FAILED|ERROR)(?:\s|$)", line))]
    failed = [line.strip()[:300] for state, line in states if state != "PASSED"] + [line[:300] for line in lines if line.startswith("/")]
    if ended not in ("0", "1"):  # what it was at when it ended
        failed += lines[-15:]
    passed = sum(state == "PASSED" for state, _ in states)
    return {"passed": passed, "failed": len(states) - passed, "ended": ended}, failed[:200]


def graphs(on_gpu: bool, deadline: float, name: str) -> dict:
    """A captured CUDA graph, replayed on changed inputs, gives what an eager call gives."""
    if not on_gpu:
        return skipped("CUDA graphs need a GPU")
    x, codebook = (t.cuda() for t in cases.clustered(3000, 500, 64, seed=1))
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                vqfast.vector_quantize(x, codebook, backend=name)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = vqfast.vector_quantize(x, codebook, backend=name)
        wrong = 0
        for seed in range(2, 6):
            fresh = cases.clustered(3000, 500, 64, seed=seed)
            x.copy_(fresh.x), codebook.copy_(fresh.codebook)
            graph.replay()
            replayed = captured.indices.clone(), captured.quantized.clone(), captured.loss.clone()
            eager = vqfast.vector_quantize(x, codebook, backend=name)
            wrong += not all(torch.equal(a, b) for a, b in zip(replayed, (eager.indices, eager.quantized, eager.loss)))
    return verdict({"backend": name, "replays": 4, "wrong": wrong})


def streams(on_gpu: bool, deadline: float, name: str) -> dict:
    """Two streams at once: each op runs on the stream that is current, and neither disturbs the other."""
    if not on_gpu:
        return skipped("streams need a GPU")
    data = [tuple(t.cuda() for t in cases.clustered(20000, 1000, 64, seed=s)) for s in (1, 2)]
    expected = [vqfast.nearest(*pair, backend=name).indices for pair in data]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = [[], []]
    for _ in range(10):
        for lane, stream in enumerate(lanes):
            with torch.cuda.stream(stream):
                moved = data[lane][0] + 0.0  # produced on this stream, so a launch on another one would race with it
                found[lane].append(vqfast.nearest(moved, data[lane][1], backend=name).indices)
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(f, e) for lane, e in zip(found, expected) for f in lane)
    return verdict({"backend": name, "calls": 20, "wrong": wrong})


def beyond_32_bits(on_gpu: bool, deadline: float, name: str) -> dict:
    """More than 2^31 elements of x, of the codebook, and of N x K."""
    if not on_gpu:
        return skipped("takes tens of gigabytes; tests/kernels covers strides beyond 2^31 on the CPU")
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        return skipped(f"{free / 2**30:.0f} GiB free, 40 are needed")
    rows = []
    codebook = cases.normal(64, 128, seed=1).cuda()
    n = 2**31 // 128 + 4096
    x = torch.zeros(n, 128, dtype=torch.float16, device="cuda")
    tail = cases.normal(4096, 128, seed=2).half()
    x[-4096:] = tail.cuda()
    got = vqfast.nearest(x, codebook, backend=name).indices[-4096:].cpu()
    rows.append({"backend": name, "what": "N D > 2^31", "wrong": int((got != oracle.nearest(tail, codebook.cpu()).indices).sum())})
    del x
    big = torch.full((2**31 // 128 + 64, 128), 100.0, dtype=torch.float16, device="cuda")
    big[-64:] = codebook
    query = codebook[:32].half()
    got = vqfast.nearest(query, big, backend=name).indices.cpu()
    want = torch.arange(32) + len(big) - 64
    rows.append({"backend": name, "what": "K D > 2^31", "wrong": int((got != want).sum())})
    del big
    many = cases.normal(2**19, 32, seed=3)
    codes = cases.normal(8192, 32, seed=4)
    got = vqfast.nearest(many.cuda(), codes.cuda(), backend=name).indices[-4096:].cpu()
    rows.append({"backend": name, "what": "N K > 2^31", "wrong": int((got != oracle.nearest(many[-4096:], codes).indices).sum())})
    return verdict(*rows)


def determinism(on_gpu: bool, deadline: float, name: str) -> dict:
    """The same bits from twenty runs of a training step, of its gradient and of gather's, with half of the rows on one code."""
    n, k, runs = (200_000, 4096, 20) if on_gpu else (200, 20, 3)
    x, codebook = (t.to(device(on_gpu)) for t in cases.clustered(n, k, 64, seed=3))
    x[::2] = codebook[7]
    first, wrong = None, 0
    for _ in range(runs):
        leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        step = vqfast.vector_quantize(leaf, codes, backend=name)
        (step.loss + step.quantized.square().sum()).backward()
        stats = vqfast.code_stats(x, step.indices, k, backend=name)
        table = codebook.clone().requires_grad_()
        (vqfast.gather(table, step.indices, backend=name) * x).sum().backward()
        results = [t.clone() for t in (step.indices, step.quantized, step.loss, leaf.grad, codes.grad, table.grad, *stats)]
        first = first or results
        wrong += not all(torch.equal(a, b) for a, b in zip(results, first))
    return verdict({"backend": name, "runs": runs, "rows": n, "wrong": wrong})


def microbenchmarks(on_gpu: bool, deadline: float) -> dict:
    """Single instructions beside wgmma, cluster sync, reductions under skewed codes: bench/gpu_micro.py."""
    if not on_gpu:
        return skipped("microbenchmarks need a GPU")
    import gpu_micro

    return gpu_micro.microbenchmarks(on_gpu, deadline)


SANITIZED = """
import ctypes, pathlib, sys; sys.path[:0] = ["tests"]
import torch, cases, vqfast
backend = sys.argv[1]
searches = [()]
if backend == "cuda":
    library = ctypes.CDLL(str(pathlib.Path(vqfast.__file__).with_name("_C_cuda.so")))
    hopper = torch.cuda.get_device_capability()[0] == 9
    searches = [(few, screen) for few, screen in ((0, 0), (1, 0), (0, 1)) if hopper or not screen]
for search in searches:
    if search:
        library.vqfast_cuda_few_rows_allow(search[0]), library.vqfast_cuda_hopper_allow(search[1])
    for n, k, dim in ((130, 70, 33), (40, 700, 100), (140, 600, 200)):  # of the last, a ring of four tiles of 128 codes goes around
        x, codebook = (t.cuda() for t in cases.clustered(n, k, dim, seed=1))
        step = vqfast.vector_quantize(x, codebook, backend=backend)
        vqfast.nearest(x[:, :7], codebook[:, :7], backend=backend)
vqfast.code_stats(x, step.indices, k, backend=backend)
x, codebook = (t.cuda() for t in cases.clustered(130, 70, 33, seed=1))
picture, weight = x[:, :32].reshape(13, 10, 16, 2), x[:70, :10].reshape(70, 10, 1, 1).repeat(1, 1, 5, 3)
y = getattr(torch.ops.vqfast, f"masked_conv_{backend}")(picture, weight, None, True, 2, 2)
getattr(torch.ops.vqfast, f"masked_conv_backward_{backend}")(y, picture, weight, True, 2, 2, True, True)
gate = getattr(torch.ops.vqfast, f"gate_{backend}")(y, None, 0)
getattr(torch.ops.vqfast, f"gate_backward_{backend}")(gate, y, None, 0)
torch.cuda.synchronize()
"""


def sanitizer(on_gpu: bool, deadline: float) -> dict:
    """compute-sanitizer on small shapes: memcheck, racecheck and synccheck on the CUDA backend's searches, memcheck on Triton."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not on_gpu or tool is None:
        return skipped("needs a GPU and compute-sanitizer")
    names = backends(on_gpu)
    wanted = [(check, "cuda") for check in ("memcheck", "racecheck", "synccheck")] + [("memcheck", "triton")]
    rows = [{"backend": name, "tool": "", "exit": "cannot run", "summary": ""} for name in ("cuda", "triton") if name not in names]
    for check, name in (pair for pair in wanted if pair[1] in names):
        limit = min(120.0, deadline - time.monotonic())
        if limit < 20:
            return {"state": "failed", "why": f"no time left for {check}; run this section again", "rows": rows}
        # torch's caching allocator would hide accesses past the end of a tensor.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        words = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, name]
        row = {"backend": name, "tool": check, "exit": "", "summary": ""}
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            rows.append({**row, "exit": f"none within {limit:.0f} s"})
            continue
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
        if any("not supported" in line for line in told) and not any(row["exit"] for row in rows):
            return {**skipped("compute-sanitizer does not work on this machine"), "rows": rows}
        last = (told or done.stderr.strip().splitlines() or [""])[-1]
        rows.append({**row, "exit": done.returncode, "summary": last[:200]})
    return {"state": "failed" if any(row["exit"] for row in rows) else "passed", "rows": rows}

"""Sections that ask whether results are right. Each takes (on_gpu, deadline) and returns what goes into the result file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


def small(on_gpu: bool, deadline: float) -> dict:
    """Every backend against the oracle on adversarial data: the first minute on a new device."""
    names = backends(on_gpu)
    if not names:
        return skipped("neither Triton nor the CUDA library can run here")
    builds = cases.NEAREST if on_gpu else cases.NEAREST[::6]
    rows = []
    for name in names:
        wrong = []
        for build in builds:
            for metric in ("l2", "cosine", "dot"):
                x, codebook = build()
                expected = oracle.nearest(x, codebook, metric)
                got = vqfast.nearest(x.to(device(on_gpu)), codebook.to(device(on_gpu)), metric=metric, backend=name)
                if not torch.equal(got.indices.cpu(), expected.indices):
                    wrong.append(f"{build.__name__} {metric} index")
                elif not torch.equal(got.distance.cpu().nan_to_num(-7.0), expected.distance.nan_to_num(-7.0)):
                    wrong.append(f"{build.__name__} {metric} distance")
        rows.append({"backend": name, "cases": 3 * len(builds), "wrong": len(wrong), "which": ", ".join(wrong[:5])})
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": rows}


def suite(on_gpu: bool, deadline: float) -> dict:
    """The op suite on every GPU backend, by pytest."""
    if not backends(on_gpu):
        return skipped("neither Triton nor the CUDA library can run here")
    folder = ROOT / "tests" / "ops"
    if on_gpu:
        kernels = [str(path) for path in (ROOT / "tests" / "kernels").glob("test_interpreted*.py")]
        words = [str(folder), str(ROOT / "tests" / "cuda" / "test_gpu.py"), *kernels, "-k", "triton or cuda or kernels"]
    else:
        words = [str(folder / "test_gather.py"), "-k", "triton and (test_groups or test_every_hole)"]
    limit = max(30.0, min(240.0, deadline - time.monotonic()))
    start = [sys.executable, "-m", "pytest", "-q", "-x" if not on_gpu else "--maxfail=20", "-p", "no:cacheprovider", "--tb=line"]
    try:
        # Without a GPU the tests would run one in sixteen of these, for their time.
        environment = {**os.environ, "VQFAST_TEST_INTERPRETER": "1"}
        done = subprocess.run([*start, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace")[-500:]
        return {"state": "failed", "why": f"not finished after {limit:.0f} s", "tail": tail}
    summary = (done.stdout.strip().splitlines() or [""])[-1]
    failures = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M)[:20]
    some_passed = re.search(r"\b\d+ passed", summary)  # a suite that skipped everything shows nothing
    return {"state": "passed" if done.returncode == 0 and some_passed else "failed", "summary": summary, "failures": failures}


def graphs(on_gpu: bool, deadline: float) -> dict:
    """A captured CUDA graph, replayed on changed inputs, gives what an eager call gives."""
    if not on_gpu:
        return skipped("CUDA graphs need a GPU")
    rows = []
    for name in backends(on_gpu, "quantize"):
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
        rows.append({"backend": name, "replays": 4, "wrong": wrong})
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": rows}


def streams(on_gpu: bool, deadline: float) -> dict:
    """Two streams at once: each op runs on the stream that is current, and neither disturbs the other."""
    if not on_gpu:
        return skipped("streams need a GPU")
    rows = []
    for name in backends(on_gpu):
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
        rows.append({"backend": name, "calls": 20, "wrong": wrong})
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": rows}


def beyond_32_bits(on_gpu: bool, deadline: float) -> dict:
    """More than 2^31 elements of x, of the codebook, and of N x K."""
    if not on_gpu:
        return skipped("takes tens of gigabytes; tests/kernels covers strides beyond 2^31 on the CPU")
    free = torch.cuda.mem_get_info()[0]
    if free < 40 * 2**30:
        return skipped(f"{free / 2**30:.0f} GiB free, 40 are needed")
    rows = []
    for name in backends(on_gpu):
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
        torch.cuda.empty_cache()
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": rows}


def determinism(on_gpu: bool, deadline: float) -> dict:
    """The same bits from twenty runs of a training step, of its gradient and of gather's, with half of the rows on one code."""
    names = backends(on_gpu, "quantize")
    if not names:
        return skipped("neither Triton nor the CUDA library can run here")
    n, k, runs = (200_000, 4096, 20) if on_gpu else (200, 20, 3)
    rows = []
    for name in names:
        x, codebook = (t.to(device(on_gpu)) for t in cases.clustered(n, k, 64, seed=3))
        x[::2] = codebook[7]
        first, different = None, 0
        for _ in range(runs):
            leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
            step = vqfast.vector_quantize(leaf, codes, backend=name)
            (step.loss + step.quantized.square().sum()).backward()
            stats = vqfast.code_stats(x, step.indices, k, backend=name)
            table = codebook.clone().requires_grad_()
            (vqfast.gather(table, step.indices, backend=name) * x).sum().backward()
            results = [t.clone() for t in (step.indices, step.quantized, step.loss, leaf.grad, codes.grad, table.grad, *stats)]
            first = first or results
            different += not all(torch.equal(a, b) for a, b in zip(results, first))
        rows.append({"backend": name, "runs": runs, "rows": n, "different": different})
    return {"state": "failed" if any(row["different"] for row in rows) else "passed", "rows": rows}


def microbenchmarks(on_gpu: bool, deadline: float) -> dict:
    """Single instructions beside wgmma, cluster sync, reductions under skewed codes: bench/gpu_micro.py."""
    if not on_gpu:
        return skipped("microbenchmarks need a GPU")
    import gpu_micro

    return gpu_micro.microbenchmarks(on_gpu, deadline)


SANITIZED = """
import sys; sys.path[:0] = ["tests"]
import torch, cases, vqfast
x, codebook = (t.cuda() for t in cases.clustered(130, 70, 33, seed=1))
for backend in sys.argv[1:]:
    step = vqfast.vector_quantize(x, codebook, backend=backend)
    vqfast.code_stats(x, step.indices, 70, backend=backend)
    vqfast.nearest(x[:, :7], codebook[:, :7], backend=backend)
    if vqfast._backends.reasons("masked_conv", backend, x):
        continue
    picture, weight = x[:, :32].reshape(13, 10, 16, 2), x[:70, :10].reshape(70, 10, 1, 1).repeat(1, 1, 5, 3)
    y = getattr(torch.ops.vqfast, f"masked_conv_{backend}")(picture, weight, None, True, 2, 2)
    getattr(torch.ops.vqfast, f"masked_conv_backward_{backend}")(y, picture, weight, True, 2, 2, True, True)
    gate = getattr(torch.ops.vqfast, f"gate_{backend}")(y, None, 0)
    getattr(torch.ops.vqfast, f"gate_backward_{backend}")(gate, y, None, 0)
torch.cuda.synchronize()
"""


def sanitizer(on_gpu: bool, deadline: float) -> dict:
    """compute-sanitizer memcheck and racecheck on small shapes."""
    tool = shutil.which("compute-sanitizer")
    if not on_gpu or tool is None:
        return skipped("needs a GPU and compute-sanitizer")
    rows = []
    for check in ("memcheck", "racecheck"):
        limit = min(120.0, deadline - time.monotonic())
        if limit < 20:
            return {"state": "failed", "why": f"no time left for {check}; run this section again", "rows": rows}
        # torch's caching allocator would hide accesses past the end of a tensor.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        words = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, *backends(on_gpu)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        if "not supported" in done.stdout + done.stderr:
            return skipped("compute-sanitizer does not work on this machine")
        rows.append({"tool": check, "exit": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1][:200]})
    return {"state": "failed" if any(row["exit"] for row in rows) else "passed", "rows": rows}

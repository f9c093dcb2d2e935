"""Sections that measure. Each checks its results first and gives no number for a wrong one; peers run in the same process, after warm-up."""

from __future__ import annotations

import statistics as summary
import time

import cases
import torch
from gpu import peers
from gpu.checks import backends, device, skipped

import vqfast
import vqfast.nn

# Dense rates of one H200 as its makers give them, for the column "floor"; other devices get none.
H200 = {"half": 989e12, "bandwidth": 4.8e12}


def timed(call, on_gpu: bool, seconds: float = 1.0, most: int = 30) -> float:
    """Median seconds of `call` after a warm-up of two; device time on a GPU, by events."""
    for _ in range(2):
        call()
    times: list[float] = []
    stop = time.monotonic() + seconds
    while len(times) < 3 or (time.monotonic() < stop and len(times) < most):
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return summary.median(times)


def extra_memory(call, on_gpu: bool) -> int | None:
    """Peak bytes that `call` allocates beyond what is there before."""
    if not on_gpu:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def clock(on_gpu: bool) -> float | None:
    """Hz of the multiprocessors right after work; None where nobody can say."""
    try:
        return torch.cuda.clock_rate() * 1e6 if on_gpu else None
    except Exception:  # needs a package of NVIDIA's
        return None


def encoder_rows(n: int, k: int, dim: int, seed: int, on_gpu: bool, dtype=torch.float32):
    """Clustered rows and codes with the falling spectrum of encoder outputs."""
    x, codebook = cases.clustered(n, k, dim, seed=seed, spread=0.5)
    spectrum = torch.arange(1, dim + 1) ** -0.5
    return (x * spectrum).to(device(on_gpu), dtype), (codebook * spectrum).to(device(on_gpu), dtype)


def nearest(on_gpu: bool, deadline: float) -> dict:
    """nearest at D = 64, 128, 256, K = 16,384 (and 1,024), N = 1M, float32 and bfloat16, beside its peers."""
    names = backends(on_gpu)
    if not names:
        return skipped("neither Triton nor the CUDA library can run here")
    shapes = [(1 << 20, 16384, d) for d in (64, 128, 256)] + [(1 << 20, 1024, 64), (1024, 4096, 256)]
    rows, wrong = [], 0
    for n, k, d in shapes if on_gpu else [(64, 100, 32)]:
        for dtype in (torch.float32, torch.bfloat16):
            if time.monotonic() > deadline - 10:
                return {"state": "failed", "why": "out of time; run this section again", "rows": rows}
            x, codebook = encoder_rows(n, k, d, seed=d, on_gpu=on_gpu, dtype=dtype)
            sample = torch.randperm(n, generator=cases.generator(0))[:4096]  # of all waves of programs
            expected = vqfast.nearest(x[sample].cpu(), codebook.cpu()).indices
            callers = {name: lambda name=name: vqfast.nearest(x, codebook, backend=name).indices for name in names}
            callers |= peers.searches(x, codebook)
            first = None  # what ours found, which is one and the same for all of them, every time
            for who, call in callers.items():
                row = {"N": n, "K": k, "D": d, "dtype": str(dtype).removeprefix("torch."), "who": who}
                try:
                    found = call()
                    different = int((found[sample].cpu() != expected).sum())
                    if who in names:
                        first = found if first is None else first
                        different += sum(int((codes != first).sum()) for codes in (found, call(), call()))
                except Exception as error:
                    rows.append({**row, "note": f"{type(error).__name__}: {error}"[:80]})
                    continue
                row["wrong of sample"] = different
                if who in names and different:
                    wrong += 1  # ours must be exact: no number
                    rows.append(row)
                    continue
                seconds = timed(call, on_gpu)
                row |= {"ms": round(seconds * 1e3, 3)}
                if on_gpu:
                    row["TFLOP/s"] = round(2 * n * k * d / seconds / 1e12, 1)
                    hz, units = clock(on_gpu), torch.cuda.get_device_properties(0).multi_processor_count
                    row["scores/clk/SM"] = round(n * k / seconds / (hz * units), 2) if hz else None
                    if "H200" in torch.cuda.get_device_name():
                        floor = max(2 * n * k * d / H200["half"], n * d * x.element_size() / H200["bandwidth"])
                        row["of floor"] = round(floor / seconds, 3)
                rows.append(row)
    return {"state": "failed" if wrong else "passed", "rows": rows}


def statistics(on_gpu: bool, deadline: float) -> dict:
    """code_stats at N = 1M, D = 128, K = 8,192, uniform codes and half of the rows on one, against the bandwidth of a copy."""
    names = backends(on_gpu, "ema")
    if not names:
        return skipped("neither Triton nor the CUDA library can run here")
    n, k, d = (1 << 20, 8192, 128) if on_gpu else (300, 20, 16)
    x = cases.normal(n, d, seed=1).to(device(on_gpu))
    uniform = torch.randint(0, k, (n,), generator=cases.generator(2)).to(x.device)
    hot = torch.where(torch.arange(n, device=x.device) % 2 == 0, 5, uniform)
    copy = 2 * x.nbytes / timed(lambda: x.clone(), on_gpu)
    rows, wrong = [{"who": "copy", "GB/s": round(copy / 1e9, 1)}], 0
    for who in (*names, "index_add_ (float atomics)"):
        for label, indices in (("uniform", uniform), ("half on one code", hot)):
            if who in names:
                def call(indices=indices, who=who):
                    return vqfast.code_stats(x, indices, k, backend=who).sums
                expected = torch.zeros(k, d, dtype=torch.float64, device=x.device).index_add_(0, indices, x.double())
                if not torch.allclose(call().double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
                    wrong += 1
                    rows.append({"who": who, "codes": label, "note": "wrong sums"})
                    continue
            else:
                def call(indices=indices):
                    return torch.zeros(k, d, device=x.device).index_add_(0, indices, x)
            seconds = timed(call, on_gpu)
            reached = x.nbytes / seconds
            rows.append({"who": who, "codes": label, "ms": round(seconds * 1e3, 3), "GB/s": round(reached / 1e9, 1),
                         "of copy": round(reached / copy, 3)})  # fmt: skip
    return {"state": "failed" if wrong else "passed", "rows": rows}


def training_step(on_gpu: bool, deadline: float) -> dict:
    """A quantizer's training step (search, statistics, update, gradient) at K = 65,536, beside vector-quantize-pytorch."""
    n, k, d = (8192, 65536, 64) if on_gpu else (64, 50, 16)
    x = cases.normal(1, n, d, seed=1).to(device(on_gpu))
    rows = []
    quantizers = {"vqfast": lambda: vqfast.nn.VectorQuantizerEMA(d, k)} | peers.quantizers(d, k)
    for who, build in quantizers.items():
        try:
            layer = build().to(x.device).train()

            def step(layer=layer):
                leaf = x.clone().requires_grad_()
                out = layer(leaf)
                loss = out.loss if who == "vqfast" else out[2].sum()
                (loss + (out.quantized if who == "vqfast" else out[0]).square().mean()).backward()
                return leaf.grad

            if not bool(torch.isfinite(step()).all()):
                return {"state": "failed", "why": f"{who}: gradient is not finite"}
            seconds, memory = timed(step, on_gpu), extra_memory(step, on_gpu)
            rows.append({"who": who, "N": n, "K": k, "D": d, "ms": round(seconds * 1e3, 3),
                         "extra MiB": None if memory is None else round(memory / 2**20, 1)})  # fmt: skip
        except Exception as error:
            rows.append({"who": who, "note": f"{type(error).__name__}: {error}"[:80]})
    mine = [row for row in rows if row["who"] == "vqfast" and "ms" in row]
    return {"state": "passed" if mine else "failed", "rows": rows}


def certificates(on_gpu: bool, deadline: float) -> dict:
    """Share of rows that the Triton screens leave open, whole rows and principal directions, by data: a count, not a time."""
    if "triton" not in backends(on_gpu):
        return skipped("Triton cannot run here")
    from vqfast.kernels import nearest as module
    from vqfast.kernels._triton import shared_memory

    n = 100_000 if on_gpu else 200
    rows = []
    data = [("encoder-like", 0.0, 1024, 64), ("offset 1000", 1000.0, 1024, 64)]
    data += [("encoder-like", 0.0, 8192, dim) for dim in (128, 256)]
    for label, offset, k, dim in data if on_gpu else data[:3]:
        k = k if on_gpu else k // 8
        x, codebook = encoder_rows(n, k, dim, seed=9, on_gpu=on_gpu)
        x, codebook = (x + offset)[None, None], (codebook + offset)[None]
        config = module._tuning.screen(dim, shared_memory(x))
        codes = module._prepare_codes(codebook, 0, config.row, config.half)
        distance = torch.empty(x.shape[:3], device=x.device)
        indices = torch.empty(x.shape[:3], dtype=torch.int64, device=x.device)
        left = int(module._search((0, n), x, codebook, codes, 0, config, distance, indices).sum())
        rows.append({"data": label, "K": k, "D": dim, "rows": n, "open": left, "share": round(left / n, 5)})
        if dim >= module._tuning.REDUCED_DIM:
            reduced = module._reduce_codes(codes, k, dim)
            left = int(module._search_reduced((0, n), x, codebook, codes, reduced, 0, distance, indices).count.sum())
            rows.append({"data": f"{label}, directions", "K": k, "D": dim, "rows": n, "open": left, "share": round(left / n, 5)})
    return {"rows": rows}

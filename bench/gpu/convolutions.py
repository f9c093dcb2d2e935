"""Section masked_conv: right first, then speed, beside torch's own convolutions with a multiplied mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu.checks import backends, device, skipped
from gpu.speed import timed
from torch.nn import functional as F

from vqfast import _border
from vqfast import reference_masked_conv as reference
from vqfast.ops.masked_conv import cropped_conv

# batch, in, out, height, width, kernel; layers of priors: PixelSNAIL, Gated PixelCNN, a first layer.
LAYERS = [(64, 256, 256, 32, 32, 3), (64, 128, 256, 32, 32, 5), (64, 64, 128, 64, 64, 7)]
ODD = [(2, 5, 17, 5, 9, 3, 1), (3, 6, 12, 4, 7, 5, 3), (1, 130, 65, 2, 33, 7, 1)]  # ... and dilation
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def layer(shape, dtype, on_gpu: bool, seed: int = 0) -> list[torch.Tensor]:
    b, cin, cout, h, w, k = shape[:6]
    generator = torch.Generator().manual_seed(seed)
    sizes = (b, cin, h, w), (cout, cin, k, k), (cout,), (b, cout, h, w)
    scale = 1.0, (cin * k * k) ** -0.5, 1.0, 1.0
    return [(s * torch.randn(size, generator=generator)).to(device(on_gpu), dtype) for size, s in zip(sizes, scale)]


class Way(NamedTuple):
    forward: Callable  # x, weight, bias -> y
    step: Callable  # x, weight, bias, grad -> y and the gradients to x, weight and bias


def ours(backend: str, *mask) -> Way:
    """The ops themselves: autograd would take the gradients from the fastest backend, not from this one."""
    conv, backward = _border.call("masked_conv", backend), _border.call("masked_conv_backward", backend)

    def forward(x, weight, bias):
        return conv(x, weight, bias, *mask)

    def step(x, weight, bias, grad):
        return [forward(x, weight, bias), *backward(grad, x, weight, *mask, True, True), grad.sum((0, 2, 3))]

    return Way(forward, step)


def by_autograd(forward: Callable) -> Way:
    def step(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs[:-1]]
        y = forward(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs[-1])]

    return Way(forward, step)


def wrong(way: Way, shape, dtype, mask, on_gpu: bool) -> str:
    """Empty when y and two gradients lie within the bound of a float32 sum in any order and one rounding; else which do not."""
    x, weight, bias, grad = layer(shape, dtype, on_gpu)
    got = way.step(x, weight, bias, grad)
    results = []
    for size in (lambda t: t, torch.Tensor.abs):
        a, w, c, g = (size(t.double().cpu()) for t in (x, weight, bias, grad))
        results.append([reference.masked_conv(a, w, c, *mask), *reference.masked_conv_backward(g, a, w, *mask, True, True)])
    counts = weight[0].numel() + 1, weight[:, 0].numel(), grad[:, 0].numel()
    step = ROUNDING[dtype]
    found = []
    for name, a, value, terms, n in zip(("y", "grad x", "grad weight"), got, *results, counts):
        allowed = (n + 1) * 2.0**-24 * terms + (step * value.abs() + 2.0**-24 if step > 2.0**-24 else 0.0)
        if not bool(((a.double().cpu() - value).abs() <= allowed).all()):
            found.append(name)
    return ", ".join(found)


def different_runs(way: Way, shape, dtype, on_gpu: bool, runs: int) -> int:
    """How many of `runs` repetitions differ in a bit from the first."""
    inputs = layer(shape, dtype, on_gpu, seed=1)
    first = way.step(*inputs)
    again = (way.step(*inputs) for _ in range(runs - 1))
    return sum(not all(map(torch.equal, first, results)) for results in again)


def replay_differs(way: Way, shape, dtype) -> bool:
    """Whether a captured step, replayed on changed inputs, gives other bits than an eager call."""
    inputs = layer(shape, dtype, True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            way.step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = way.step(*inputs)
    for old, new in zip(inputs, layer(shape, dtype, True, seed=2)):
        old.copy_(new)
    graph.replay()
    return not all(map(torch.equal, captured, way.step(*inputs)))


def flagged(way: Way, tf32: bool) -> Way:
    """The same with or without TF32 in cuDNN, backward too."""

    def wrapped(call: Callable) -> Callable:
        def run(*inputs):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32, benchmark=True):
                return call(*inputs)

        return run

    return Way(*map(wrapped, way))


def peers(on_gpu: bool) -> dict[str, Way]:
    """Torch's own ways to a layer with mask B. On a GPU also with TF32, which its convolutions take by default."""

    def full(x, weight, bias):
        return F.conv2d(x, weight * reference.causal_mask(weight, True, 1), bias, padding=weight.shape[-1] // 2)

    multiplied, cropped = by_autograd(full), by_autograd(lambda x, w, bias: cropped_conv(x, w, bias, True))
    found = {"multiplied mask": flagged(multiplied, False), "cropped torch": flagged(cropped, False)}
    return found | ({"multiplied mask, TF32": flagged(multiplied, True)} if on_gpu else {})


def speed_rows(on_gpu: bool, names: list[str], deadline: float) -> list[dict]:
    """Forward and step of layers of priors; ours only where one picture of the layer comes out right."""
    rows = []
    for shape in LAYERS if on_gpu else [(1, 8, 16, 6, 6, 3)]:
        b, cin, cout, h, w, k = shape
        operations = 2 * b * h * w * cin * cout * (k * k // 2 + 1)  # of the unmasked taps, for everybody
        for dtype in (torch.float32, torch.bfloat16):
            inputs = layer(shape, dtype, on_gpu)
            ways = {name: ours(name, True, 1, 1) for name in names} | peers(on_gpu)
            for who, way in ways.items():
                if dtype != torch.float32 and who.endswith("TF32"):
                    continue
                row = {"layer": f"{cin}->{cout}, {k} x {k}, {b} x {h} x {w}", "dtype": str(dtype).removeprefix("torch."), "who": who}
                if time.monotonic() > deadline - 5:
                    return [*rows, {**row, "wrong": "not reached: out of time, run this section again"}]
                if who in names and (bad := wrong(way, (1, *shape[1:]), dtype, (True, 1, 1), on_gpu)):
                    rows.append({**row, "wrong": bad})
                    continue
                with torch.no_grad():
                    forward = timed(lambda way=way: way.forward(*inputs[:3]), on_gpu, 0.5)
                step = timed(lambda way=way: way.step(*inputs), on_gpu, 0.5)
                row |= {"wrong": "", "ms": round(forward * 1e3, 3), "ms of a step": round(step * 1e3, 3)}
                if on_gpu:
                    row["useful TFLOP/s"] = round(operations / forward / 1e12, 1)
                rows.append(row)
    return rows


def gate_rows(on_gpu: bool, names: list[str]) -> list[dict]:
    """The gate and its gradient, against torch's composition of it."""
    b, c, h, w = (64, 512, 32, 32) if on_gpu else (1, 8, 4, 4)
    x = torch.randn((b, c, h, w), generator=torch.Generator().manual_seed(3)).to(device(on_gpu))
    grad = torch.ones(b, c // 2, h, w, device=x.device)

    def of(backend):
        gate, backward = _border.call("gate", backend), _border.call("gate_backward", backend)
        return lambda: [gate(x, None, reference.TANH), backward(grad, x, None, reference.TANH)]

    torchs = by_autograd(lambda t: torch.tanh(t[:, : c // 2]) * torch.sigmoid(t[:, c // 2 :]))
    calls = {name: of(name) for name in names} | {"torch": lambda: torchs.step(x, grad)}
    expected = [torchs.forward(x.double()), torchs.step(x.double(), grad.double())[1]]
    rows = []
    for who, call in calls.items():
        row = {"layer": f"gate, {b} x {c} x {h} x {w}", "dtype": "float32", "who": who}
        off = max(float((a - e).abs().max()) for a, e in zip(call(), expected))
        if off > 2.0**-19:
            rows.append({**row, "wrong": f"by {off:.2g}"})
            continue
        seconds = timed(call, on_gpu, 0.5)
        moved = 3 * x.nbytes + 2 * grad.nbytes  # x read twice, its gradient written, y written, grad read
        rows.append({**row, "wrong": "", "ms of a step": round(seconds * 1e3, 3), "GB/s": round(moved / seconds / 1e9, 1)})
    return rows


def right_rows(on_gpu: bool, names: list[str]) -> list[dict]:
    rows = []
    for name in names:
        for *shape, dilation in [*ODD, (64, 256, 256, 8, 8, 3, 1)] if on_gpu else ODD[:2]:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                mask = (True, dilation, 1)
                way = ours(name, *mask)
                row = {"layer": str(shape), "dtype": str(dtype).removeprefix("torch."), "who": name,
                       "wrong": wrong(way, shape, dtype, mask, on_gpu)}  # fmt: skip
                if on_gpu and different_runs(way, shape, dtype, on_gpu, 20):
                    row["wrong"] += " other bits in another run"
                if on_gpu and replay_differs(way, shape, dtype):
                    row["wrong"] += " other bits from a replayed graph"
                rows.append(row)
    return rows


def masked_conv(on_gpu: bool, deadline: float) -> dict:
    """masked_conv and gate: values and gradients against float64, same bits 20 times and in a replayed graph; speed beside torch's."""
    names = backends(on_gpu, "masked_conv")
    if not names:
        return skipped("neither Triton nor the CUDA library can run here")
    rows = right_rows(on_gpu, names)
    if not any(row["wrong"] for row in rows):
        rows += speed_rows(on_gpu, names, deadline) + gate_rows(on_gpu, names)
    return {"state": "failed" if any(row["wrong"] for row in rows) else "passed", "rows": rows}

"""masked_conv and the training speed of the Gated PixelCNN, against full-size kernels with a multiplied mask.

    python bench/bench_masked_conv.py [--threads 2] [--batch 4]

Three ways to train the same network: full k x k kernels whose mask is multiplied in each forward (what most
repositories do), cropped
torch kernels with torch's own gate, and this package (cropped kernels, fused gate). Checked first: all three give
the same loss and
gradient.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import vqfast
from vqfast import _backends, reference_masked_conv
from vqfast.models import prior_blocks
from vqfast.models.pixelcnn import GatedPixelCNN
from vqfast.ops.masked_conv import cropped_conv, masked_conv2d


def machine(threads: int) -> str:
    name = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    run = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(run, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = f"torch {torch.__version__}, vqfast {vqfast.__version__} at {commit}"
    return f"{name}, CPU level {_backends.cpu_level()}, {threads} threads, {versions}"


def plain_gate(x, vector=None, *, kind="tanh", backend=None):
    a, b = (x if vector is None else x + vector[:, :, None, None]).chunk(2, dim=1)
    return (torch.tanh(a) if kind == "tanh" else a) * torch.sigmoid(b)


class FullKernel(nn.Module):
    """A [height, width] kernel times its mask, standing in for a cropped one, which was its part [rows, columns]."""

    def __init__(self, conv: nn.Conv2d, height: int, width: int, rows: slice, columns: slice):
        super().__init__()
        weight = torch.zeros(conv.out_channels, conv.in_channels, height, width)
        weight[:, :, rows, columns] = conv.weight.detach()
        mask = torch.zeros(height, width)
        mask[rows, columns] = 1
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(conv.bias.detach().clone())
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=[k // 2 for k in self.mask.shape])


class FullLayer(nn.Module):
    """GatedLayer with full-size masked kernels: k x k in the vertical stack, 1 x k in the horizontal one."""

    def __init__(self, layer: prior_blocks.GatedLayer):
        super().__init__()
        r, seen = layer.reach, not layer.first
        self.first = layer.first
        self.vertical = FullKernel(layer.vertical, 2 * r + 1, 2 * r + 1, slice(0, r + seen), slice(None))
        self.horizontal = FullKernel(layer.horizontal, 1, 2 * r + 1, slice(None), slice(0, r + seen))
        self.vertical_to_horizontal, self.residual = layer.vertical_to_horizontal, layer.residual

    def forward(self, v, h, label, condition):
        vertical = self.vertical(v)
        out = self.residual(plain_gate(self.horizontal(h) + self.vertical_to_horizontal(vertical)))
        return plain_gate(vertical), out if self.first else out + h


def networks() -> dict[str, nn.Module]:
    """The same weights three times."""
    ours, cropped, full = (GatedPixelCNN() for _ in range(3))
    cropped.load_state_dict(ours.state_dict())
    full.load_state_dict(ours.state_dict())
    full.layers = nn.ModuleList(FullLayer(layer) for layer in full.layers)
    return {"full-size masked kernels": full, "cropped torch kernels": cropped, "vqfast": ours}


def step(name: str, prior: nn.Module, codes: torch.Tensor) -> torch.Tensor:
    gate, prior_blocks.gated_activation = prior_blocks.gated_activation, prior_blocks.gated_activation
    if name != "vqfast":
        prior_blocks.gated_activation = plain_gate
    try:
        prior.zero_grad(set_to_none=True)
        loss = prior.loss(codes)
        loss.backward()
    finally:
        prior_blocks.gated_activation = gate
    return loss.detach()


def check(models: dict[str, nn.Module], codes: torch.Tensor) -> None:
    losses = {name: step(name, prior, codes) for name, prior in models.items()}
    grads = [prior.embedding.weight.grad for prior in models.values()]
    for loss, grad in zip(losses.values(), grads):
        torch.testing.assert_close(loss, losses["vqfast"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, grads[-1], rtol=1e-2, atol=1e-5)


def timed(run, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    codes = torch.randint(512, (args.batch, args.size, args.size))
    models = networks()
    check(models, codes)
    print(machine(args.threads))
    print(
        f"one training step, GatedPixelCNN 15 layers x 128 channels, batch {args.batch}, {args.size} x {args.size} codes, float32"
    )
    print("green: equal losses and gradients\n")
    base = None
    for name, prior in models.items():
        taken = timed(lambda: step(name, prior, codes), args.repeats)
        base = base or taken
        print(f"  {name:<26} {taken * 1e3:7.0f} ms   {base / taken:.2f}x")
    print("\none masked convolution, forward, 128 -> 256 channels, 32 x 32, batch 4, mask B")
    for k in (3, 5, 7):
        x, weight, bias = torch.randn(4, 128, 32, 32), torch.randn(256, 128, k, k), torch.randn(256)
        with torch.no_grad():
            ways = {
                "multiplied mask": lambda: reference_masked_conv.masked_conv(x, weight, bias, True, 1, 1),
                "cropped torch": lambda: cropped_conv(x, weight, bias, True),
                "vqfast": lambda: masked_conv2d(x, weight, bias),
            }
            torch.testing.assert_close(ways["vqfast"](), ways["multiplied mask"](), rtol=1e-3, atol=1e-2)
            times = {name: timed(way, args.repeats) for name, way in ways.items()}
        row = "   ".join(f"{name} {t * 1e3:.1f} ms ({times['multiplied mask'] / t:.2f}x)" for name, t in times.items())
        print(f"  {k} x {k}: {row}")


if __name__ == "__main__":
    main()

"""Small helpers that the op and layer tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
METRICS = ("l2", "cosine", "dot")
METRIC_CODE = {"l2": 0, "cosine": 1, "dot": 2}  # as the border writes them
ULP = 2.0**-24  # largest relative error of one float32 operation


def device_of(backend: str) -> torch.device:
    """cuda needs one, triton takes one where there is one, the others are tested on the CPU."""
    needs_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if needs_gpu else "cpu")


def put(backend: str, *tensors: torch.Tensor | None):
    """Tensors on the backend's device; strides, what lies between, offsets and None stay, but for what requires a gradient."""
    device = device_of(backend)
    moved = tuple(t if t is None or t.device == device else move(t, device) for t in tensors)
    return moved[0] if len(moved) == 1 else moved


def move(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on the device that lies in its storage as t does in its own, which `to` does not promise."""
    if t.requires_grad:
        return t.to(device)
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.to(device, copy=True).as_strided(t.size(), t.stride(), t.storage_offset())


def no_interpreter(backend: str) -> None:
    """Leaves Triton's interpreter out of tests that are made of ops which have tests of their own; a GPU runs them."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("interpreter: too slow for composed tests; the ops themselves are tested one by one")


def op(name: str, backend: str):
    """The border's own op, called without the public function's checks."""
    trailing = "_" if name.endswith("_") else ""
    full = f"{name.rstrip('_')}_{backend}{trailing}"
    if not hasattr(torch.ops.vqfast, full):
        pytest.fail(f"torch.ops.vqfast.{full} is not defined: the border promises every op under every backend's name")
    return getattr(torch.ops.vqfast, full)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal dtype, shape and values; NaN equals NaN, 0 equals -0."""
    torch.testing.assert_close(actual.detach().cpu(), expected.detach().cpu(), rtol=0, atol=0, equal_nan=True,
                               check_stride=False, msg=lambda m: f"{what}\n{m}")  # fmt: skip


def same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in every bit, the sign of zero and the payload of NaN included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    a, b = (t.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for t in (actual, expected))
    assert torch.equal(a, b), f"{what}: {(a != b).sum().item()} bytes differ"


def close(actual: torch.Tensor, expected: torch.Tensor, bound, what: str = "") -> None:
    """|actual - expected| <= bound everywhere; the bound is derived where it is passed."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs()
    excess = error - torch.as_tensor(bound, dtype=torch.float64)
    assert not excess.isnan().any() and (excess <= 0).all(), (
        f"{what}: worst error {error.max().item():.3e} exceeds its bound by {excess.max().item():.3e}"
    )


def run_python(source: str, *args: str, timeout: float = 120, **env: str) -> str:
    """Runs a script in its own interpreter, where a wrong pointer cannot take the test run with it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]), **env}
    done = subprocess.run([sys.executable, "-c", source, *args], env=environment, timeout=timeout,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout

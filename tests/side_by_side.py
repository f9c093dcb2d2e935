"""Runs a layer of vector_quantize_pytorch and vqfast's face of it side by side, from equal seeds and equal state.

Differences that rounding may make: a sum of n float32 terms is off by at most n * 2^-24 of the sum of its terms' sizes. The
longest sums here have 512 terms, and 20 steps of training add up, so 20 * 512 * 2^-24 = 6e-4 bounds what may grow; values and
gradients are of order 1.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NamedTuple

import pytest
import torch

RTOL, ATOL = 1e-3, 6e-4


class Fresh(NamedTuple):
    """An argument that each library's layer needs a copy of its own of: made by calling `make`."""

    make: Any


def libraries():
    """(the other library, vqfast's face of it); skips where the other one is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    return peer, importlib.import_module("vqfast.compat.vector_quantize_pytorch")


def pair(name: str, seed: int = 1, **kwargs):
    """The layer `name` of both libraries, from one seed; both hold the same state, loaded strictly in both directions."""
    layers = []
    for library in libraries():
        torch.manual_seed(seed)
        made = {key: value.make() if isinstance(value, Fresh) else value for key, value in kwargs.items()}
        layers.append(getattr(library, name)(**made))
    peer, ours = layers
    assert list(peer.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)
    return peer, ours


def tensors(out) -> list[torch.Tensor]:
    """All tensors of a nest of tuples, dicts and lists, in order."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for value in out.values() for t in tensors(value)]
    return [t for value in out for t in tensors(value)] if isinstance(out, (tuple, list)) else []


def step(layer, x: torch.Tensor, seed: int, rate: float = 0.01, **kwargs):
    """One forward, backward of a fixed functional of all its outputs, and gradient step; -> outputs, gradients."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    outputs = tensors(layer(x, **kwargs))
    loss = [
        (t.float() * torch.linspace(-1, 1, max(t.numel(), 1))[: t.numel()].view(t.shape)).sum() if t.dim() else 3 * t
        for t in outputs
        if t.is_floating_point() and t.requires_grad
    ]
    if loss:
        sum(loss).backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return outputs, gradients


def assert_equal(ours: torch.Tensor | None, peer: torch.Tensor | None, what: str) -> None:
    """Equal shapes, dtypes and values: integers exactly, floats within rounding; no gradient and zeros are one."""
    if ours is None or peer is None:
        rest = ours if peer is None else peer
        assert rest is None or not rest.any(), what
        return
    assert ours.shape == peer.shape and ours.dtype == peer.dtype, (what, ours.shape, peer.shape, ours.dtype, peer.dtype)
    if not ours.is_floating_point():
        assert torch.equal(ours, peer), f"{what}: {int((ours != peer).sum())} of {ours.numel()} differ"
        return
    # What was computed in half precision may differ by its last bit.
    slack = 1 if ours.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(ours.dtype).eps / ATOL
    torch.testing.assert_close(ours, peer, rtol=RTOL * slack, atol=ATOL * slack, msg=lambda text: f"{what}: {text}")


def assert_same(peer, ours, shape, *, steps=20, train=True, dtype=torch.float32, gradients=True, state=True, **kwargs) -> None:
    """Outputs, gradients and, at the end, the state of both are the same over some steps on the same data."""
    peer.train(train)
    ours.train(train)
    generator = torch.Generator().manual_seed(5)
    for number in range(steps):
        x = torch.randn(shape, generator=generator).to(dtype)
        (peer_out, peer_grad), (our_out, our_grad) = (step(layer, x, 100 + number, **kwargs) for layer in (peer, ours))
        assert len(peer_out) == len(our_out)
        for i, (a, b) in enumerate(zip(our_out, peer_out, strict=True)):
            assert_equal(a, b, f"step {number}, output {i}")
        for i, (a, b) in enumerate(zip(our_grad, peer_grad, strict=True)):
            assert_equal(a, b, f"step {number}, gradient {i}") if gradients else None
    if state:
        for name, value in peer.state_dict().items():
            assert_equal(ours.state_dict()[name], value, name)

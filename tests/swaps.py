"""What the tests of `convert` and of the faces share: running two modules side by side, and seeing the largest tensor."""

from __future__ import annotations

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns inside the block."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def largest(call) -> int:
    with Largest() as watch:
        call()
    return watch.elements


def close(ours, theirs, what="", roundings=64):
    """Same tree of results: integers equal, floats within some float32 roundings of the tensor's largest element.

    Sums in another order differ by that much, and a residual or a gradient is a difference of such sums.
    """
    ours, theirs = ([leaf for leaf in tree_leaves(tree) if leaf is not None] for tree in (ours, theirs))
    assert len(ours) == len(theirs), what
    for at, (a, b) in enumerate(zip(ours, theirs)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what} {at}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        finite = b[b.isfinite()] if b.is_floating_point() else torch.empty(0)
        bound = roundings * 2.0**-24 * finite.abs().max().item() if finite.numel() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"{what} {at}: {m}")


def train_both(ours, theirs, batches, call=lambda module, z: module(z)):
    """The same steps on both: outputs, gradients into the input and the parameters, and state must agree after each."""
    for step, batch in enumerate(batches):
        results = []
        for module in (ours, theirs):
            z = batch.clone().requires_grad_()
            module.zero_grad()
            torch.manual_seed(step)
            out = call(module, z)
            leaves = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            # Not squares: on a sphere their gradient is zero, and only rounding would be compared.
            total = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in leaves)
            if isinstance(total, torch.Tensor):
                total.backward()
            results.append((out, z.grad, [p.grad for p in module.parameters()], list(module.state_dict().values())))
        close(*results, f"step {step}")


def randomise(module, seed=0):
    """Random floating state; sizes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and "init" not in name:
            fresh = torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(fresh.abs() + 0.5 if "cluster" in name else fresh)
    return module


def twin(module):
    return copy.deepcopy(module)

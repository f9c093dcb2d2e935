"""gather (decoding) and its gradient, against torch.nn.functional.embedding and a copy of the result.

pytest bench/bench_gather.py --benchmark-only
"""

from __future__ import annotations

import torch
from _common import over, timed
from shapes import STEPS
from torch.nn import functional as F

import vqfast
from vqfast import reference

METHODS = {
    "vqfast": lambda codebook, indices: vqfast.gather(codebook, indices),
    "embedding": lambda codebook, indices: F.embedding(indices, codebook),
}


def prepared(shape, method):
    x, codebook = shape.load()
    indices = vqfast.nearest(x, codebook).indices
    wanted = reference.gather(codebook[None], indices[None, None])[0, 0]
    assert torch.equal(METHODS[method](codebook, indices), wanted)
    return codebook, indices


@over(STEPS, METHODS)
def bench_gather(benchmark, shape, method):
    codebook, indices = prepared(shape, method)
    benchmark.group = "gather"
    timed(benchmark, lambda: METHODS[method](codebook, indices), shape)


@over(STEPS, ["copy"])
def bench_copy(benchmark, shape, method):
    x, _ = shape.load()
    benchmark.group = "gather"
    timed(benchmark, x.clone, shape)


@over(STEPS, METHODS)
def bench_gather_backward(benchmark, shape, method):
    codebook, indices = prepared(shape, method)
    codebook.requires_grad_()
    out = METHODS[method](codebook, indices)
    upstream = torch.ones_like(out)
    benchmark.group = "gather, backward"
    timed(benchmark, lambda: torch.autograd.grad(out, codebook, upstream, retain_graph=True), shape)

"""Statistics per code and the moving-average update, against the one-hot product that most layers use, index_add, and a
copy of the rows.

pytest bench/bench_ema.py --benchmark-only
"""

from __future__ import annotations

import torch
from _common import over, timed
from shapes import STEPS
from torch.nn import functional as F

import vqfast
from vqfast import reference


def one_hot(x, indices, size):
    chosen = F.one_hot(indices, size).to(x.dtype)
    return chosen.t() @ x, chosen.sum(0)


def index_add(x, indices, size):
    return x.new_zeros(size, x.shape[1]).index_add_(0, indices, x), torch.bincount(indices, minlength=size)


METHODS = {"vqfast": vqfast.code_stats, "one-hot": one_hot, "index_add": index_add}


@over(STEPS, METHODS)
def bench_code_stats(benchmark, shape, method):
    x, codebook = shape.load()
    indices = vqfast.nearest(x, codebook).indices
    found = METHODS[method](x, indices, shape.codes)
    sums, counts = reference.code_stats(x.double()[None, None], indices[None, None], shape.codes)
    assert torch.equal(found[1].long(), counts[0])
    # One rounding of 2^-24 per addition, of the magnitudes that were added.
    bound = (
        2.0**-24
        * counts[0][:, None]
        * reference.code_stats(x.double().abs()[None, None], indices[None, None], shape.codes)[0][0]
    )
    assert ((found[0].double() - sums[0]).abs() <= bound).all()
    benchmark.group = "code_stats"
    timed(benchmark, lambda: METHODS[method](x, indices, shape.codes), shape)


@over(STEPS, ["copy"])
def bench_copy(benchmark, shape, method):
    x, _ = shape.load()
    benchmark.group = "code_stats"
    timed(benchmark, x.clone, shape)


@over(STEPS, ["vqfast", "torch"])
def bench_ema_update(benchmark, shape, method):
    x, codebook = shape.load()
    sums, counts = vqfast.code_stats(x, vqfast.nearest(x, codebook).indices, shape.codes)
    state = [codebook.clone(), torch.ones(shape.codes), codebook.clone()]
    call = {
        "vqfast": lambda: vqfast.ema_update_(*state, sums, counts, decay=0.99),
        "torch": lambda: plain_update(*state, sums, counts, 0.99, 1e-5),
    }[method]
    wanted = [part.double()[None] for part in state]
    call()
    reference.ema_update_(*wanted, sums.double()[None], counts[None], None, 0.99, 1e-5)
    torch.testing.assert_close(
        state[0].double(), wanted[0][0], rtol=8 * 2.0**-24, atol=8 * 2.0**-24 * codebook.abs().max().item()
    )
    benchmark.group = "ema_update"
    timed(benchmark, call, shape)


def plain_update(codebook, size, total, sums, counts, decay, eps):
    size.mul_(decay).add_(counts, alpha=1 - decay)
    total.mul_(decay).add_(sums, alpha=1 - decay)
    codebook.copy_(torch.where((size > eps)[:, None], total / size[:, None], codebook))

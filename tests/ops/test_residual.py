"""residual_quantize: the codes of a loop of single quantizers, and an identity gradient (contract 3, 4, 10, 11)."""

import math

import cases
import oracle
import pytest
import torch
from check import METRICS, ULP, close, put, same, same_bits

import vqfast

FAMILY = "residual"
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
pytestmark = pytest.mark.quick


def problem(levels=4, n=50, k=37, dim=9, seed=1, dtype=torch.float32):
    """Codes of level q are 3^-q as long, so that every level still has work."""
    codebooks = cases.normal(levels, k, dim, seed=seed) * 3.0 ** -torch.arange(levels)[:, None, None]
    return cases.normal(n, dim, seed=seed + 1).to(dtype), codebooks


def loop(x, codebooks, metric="l2"):
    """Level by level, rest in float32: indices [N, Q], rests [Q, N, D], codes [Q, N, D]."""
    rest, indices, rests, codes = x.float(), [], [], []
    for codebook in codebooks:
        index = oracle.nearest(rest, codebook, metric).indices
        code = oracle.gather(codebook.float(), index)
        indices.append(index), rests.append(rest), codes.append(code)
        rest = rest - code
    return torch.stack(indices, -1), torch.stack(rests), torch.stack(codes)


def run(backend, x, codebooks, mask=None, **options):
    return vqfast.residual_quantize(*put(backend, x, codebooks), mask=put(backend, mask), backend=backend, **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 8])
def test_codes_of_the_loop(backend, levels, dtype, metric):
    x, codebooks = problem(levels, dtype=dtype)
    out = run(backend, x, codebooks, metric=metric)
    indices, _, codes = loop(x, codebooks, metric)
    same(out.indices, indices)
    assert out.quantized.dtype == dtype and out.quantized.shape == x.shape
    size = codes.abs().sum(0) + x.float().abs()
    close(out.quantized, codes.double().sum(0), (levels + 1) * ULP * size + UNIT[dtype] * size)


def test_agrees_with_single_quantizers_of_the_same_backend(backend):
    x, codebooks = put(backend, *problem())
    rest, found = x, []
    for codebook in codebooks:
        single = vqfast.vector_quantize(rest, codebook, backend=backend)
        found.append(single.indices)
        rest = rest - single.quantized
    same(vqfast.residual_quantize(x, codebooks, backend=backend).indices, torch.stack(found, -1))


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)], ids=str)
def test_leading_axes(backend, lead):
    x, codebooks = cases.normal(*lead, 9, seed=5), problem()[1]
    out = run(backend, x, codebooks)
    assert out.indices.shape == (*lead, 4) and out.quantized.shape == x.shape
    if math.prod(lead):
        same(out.indices.reshape(-1, 4), loop(x.reshape(-1, 9), codebooks)[0])


def test_images_stay_channels_first(backend):
    x, codebooks = cases.normal(2, 9, 80, seed=7).transpose(1, 2), problem()[1]
    out = run(backend, x, codebooks)
    same(out.quantized, run(backend, x.contiguous(), codebooks).quantized)
    assert out.quantized.stride() == x.stride()


def test_losses_are_means_over_levels(backend):
    x, codebooks = problem()
    out = run(backend, x, codebooks, commitment_weight=0.5)
    _, rests, codes = loop(x, codebooks)
    mse = float((rests.double() - codes.double()).square().mean())
    close(out.commitment_loss, torch.tensor(mse), 16 * ULP * mse), close(out.codebook_loss, torch.tensor(mse), 16 * ULP * mse)
    close(out.loss, torch.tensor(1.5 * mse), 32 * ULP * mse)


def test_masked_and_nonfinite_rows(backend):
    x, codebooks = problem()
    mask = torch.arange(50) % 5 > 0
    x[7], x[21, 3], x[5] = torch.nan, torch.inf, torch.nan  # row 5 is masked
    out = run(backend, x, codebooks, mask)
    bad = mask & ~torch.isfinite(x).all(-1)
    good = mask & ~bad
    assert (out.indices.cpu()[~mask] == -1).all() and (out.quantized.cpu()[~mask] == 0).all()
    assert (out.indices.cpu()[bad] == 0).all() and out.quantized.cpu()[bad].isnan().all()
    same(out.indices.cpu()[good], loop(x[good], codebooks)[0])
    assert out.nonfinite.item() == 2, "a row is counted once, however many levels it passes"
    clean = run(backend, x[good], codebooks)
    for name in ("loss", "perplexity", "usage"):
        close(getattr(out, name), getattr(clean, name), 64 * ULP * getattr(clean, name).abs().cpu(), name)


def test_gradient_to_x_is_the_identity(backend):
    x, codebooks = problem()
    mask, upstream = torch.arange(50) % 3 > 0, cases.normal(50, 9, seed=6)
    rows, codes, flags, factor = put(backend, x, codebooks, mask, upstream)
    vqfast.residual_quantize(rows.requires_grad_(), codes, mask=flags, backend=backend).quantized.backward(factor)
    same(rows.grad, upstream * mask[:, None])


@pytest.mark.parametrize("term", ["commitment_loss", "codebook_loss"])
def test_loss_gradients_match_float64(backend, term):
    x, codebooks = problem()
    rows, codes = put(backend, x.clone(), codebooks.clone())
    getattr(vqfast.residual_quantize(rows.requires_grad_(), codes.requires_grad_(), backend=backend), term).backward()
    indices, rests, picked = loop(x, codebooks)
    per_level = 2 * (rests.double() - picked.double()) / rests.numel()
    dx = torch.zeros_like(x) if rows.grad is None else rows.grad
    dc = torch.zeros_like(codebooks) if codes.grad is None else codes.grad
    to_x = per_level.sum(0) * (term == "commitment_loss")
    to_codes = torch.zeros_like(codebooks, dtype=torch.float64)
    magnitude = torch.zeros_like(to_codes)
    for level in range(len(codebooks)):
        to_codes[level].index_add_(0, indices[:, level], -per_level[level])
        size = 2 * (rests[level].double().abs() + picked[level].double().abs()) / rests.numel()
        magnitude[level].index_add_(0, indices[:, level], size)
    if term == "commitment_loss":
        to_codes = to_codes * 0
    close(dx, to_x, 16 * ULP * per_level.abs().sum(0))
    close(dc, to_codes, (50 + 8) * ULP * magnitude)


@pytest.mark.parametrize("x, mask", [
    (torch.empty(0, 9), None), (cases.normal(6, 9), torch.zeros(6, dtype=torch.bool)), (torch.full((6, 9), math.nan), None),
], ids=["no_rows", "all_masked", "all_nonfinite"])  # fmt: skip
def test_nothing_valid(backend, x, mask):
    out = run(backend, x, problem()[1], mask)
    assert out.loss.item() == 0 and out.perplexity.item() == 1 and out.usage.item() == 0


def test_same_bits_for_any_thread_count(backend, set_threads):
    x, codebooks = put(backend, *problem(3, 4000, 50, 8))

    def step(count):
        set_threads(count)
        rows, codes = x.clone().requires_grad_(), codebooks.clone().requires_grad_()
        out = vqfast.residual_quantize(rows, codes, backend=backend)
        out.loss.backward()
        return [*out, rows.grad, codes.grad]

    first = step(1)
    for count in (2, 3, 4):
        for at, (again, before) in enumerate(zip(step(count), first)):
            same_bits(again, before, f"{count} threads, value {at}")


@pytest.mark.parametrize("x, codebooks", [
    (torch.ones(5, 7), torch.ones(2, 4, 8)), (torch.ones(5, 7), torch.ones(4, 7)), (torch.ones(5, 7), torch.ones(0, 4, 7)),
    (torch.ones(5, 7), torch.ones(2, 0, 7)), (torch.ones(5, 7).long(), torch.ones(2, 4, 7)),
], ids=["d_mismatch", "rank", "no_levels", "k_zero", "int64"])  # fmt: skip
def test_wrong_input(x, codebooks):
    with pytest.raises((ValueError, TypeError)):
        vqfast.residual_quantize(x, codebooks)


def test_second_derivative(backend):
    """Of the losses into x and into the codebooks, as the formula has it with codes of earlier levels as constants."""
    x, codebooks = (t.double() for t in problem(3, n=12, k=5, dim=4))
    x[3] = torch.nan

    def formula(x, codebooks):
        rest, loss, valid = x, 0.0, x.isfinite().all(-1).detach()
        for level, index in zip(codebooks, indices.unbind(-1)):
            code = level[index]
            loss = loss + (rest.detach() - code)[valid].square().mean() + 0.25 * (rest - code.detach())[valid].square().mean()
            rest = rest - code.detach()
        return loss / len(codebooks)

    def products(loss, *leaves):
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum((grad * grad.detach().cos()).nan_to_num(0).sum() for grad in grads), leaves)

    leaves = [t.clone().requires_grad_() for t in put(backend, x, codebooks)]
    with vqfast.use_backend("reference"):
        out = vqfast.residual_quantize(*leaves)
    indices = out.indices
    expected = products(formula(*leaves), *leaves)
    for got, wanted in zip(products(out.loss, *leaves), expected):
        close(got, wanted.nan_to_num(0), 1e-9)

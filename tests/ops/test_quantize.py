"""quantize: codes, losses, statistics and gradients of one training step (contract 3, 4, 5, 7, 8, 10, 11)."""

import math

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, ULP, close, op, put, same, same_bits

import vqfast

FAMILY = "quantize"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
pytestmark = pytest.mark.quick


def border(backend, x, codebook, mask=None, metric="l2", with_sums=True):
    """The op on x [B, G, N, D], codebook [G, K, D], mask [B, N]; outputs on the CPU."""
    found = op("quantize", backend)(*put(backend, x, codebook, mask), METRIC_CODE[metric], with_sums, None, None, None)
    return [t.cpu() for t in found]


def loss_bound(mse, dim):
    """D + 3 roundings of a sum of squares in float32, and one more for the result; all terms are positive."""
    return (dim + 4) * ULP * abs(mse) + 2.0**-149


def verify_border(backend, x, codebook, mask=None, metric="l2"):
    quantized, sq_error, indices, sums, counts, nonfinite = border(backend, x, codebook, mask, metric)
    expected = oracle.step(x, codebook, mask, metric)
    k, dim = codebook.shape[-2:]
    same(indices, expected.indices, "indices")
    same(quantized, expected.quantized.to(x.dtype), "quantized")
    assert quantized.stride() == torch.empty_like(x).stride(), "in the layout of x"
    assert sq_error.dtype == torch.float64 and nonfinite.dtype == torch.int64
    same(counts, expected.counts, "counts")
    close(sums, expected.sums, oracle.sums_bound(x.nan_to_num(0, 0, 0), expected.indices, k), "sums")
    assert nonfinite.item() == expected.nonfinite
    total = torch.tensor(expected.mse * (expected.counts.sum().item() * dim), dtype=torch.float64)
    if total.float().isinf():
        assert (sq_error.float() == total.float()).all(), "losses are float32: what lies beyond its range is inf"
    else:
        close(sq_error, total.expand(2), loss_bound(total, dim), "sq_error")


BATCHES = {
    "plain": lambda: (cases.clustered(60, 37, 9, seed=1), 1),
    "groups": lambda: (cases.clustered(60, 37, 9, seed=2), 3),
    "offset": lambda: (cases.offset(), 2),
    "nonfinite_rows": lambda: (cases.nonfinite_rows(), 2),
    "nonfinite_codes": lambda: (cases.nonfinite_codes(), 1),
    "nonfinite_rows_and_codes": lambda: (cases.nonfinite_rows_and_codes(), 2),
    "huge_code": lambda: (cases.huge_code_among_normal(), 1),
    "duplicates": lambda: (cases.duplicates_across_tiles(), 2),
    "zeros": lambda: (cases.zeros_among_normal(), 2),
    "denormals": lambda: (cases.denormals(), 1),
    "one_code": lambda: (cases.clustered(25, 1, 7, seed=3), 1),
    "one_component": lambda: (cases.clustered(25, 33, 1, seed=4), 2),
    "wide": lambda: (cases.clustered(13, 40, 1000, seed=5), 1),
}


def batch(name, dtype=torch.float32):
    """x [2, G, N, D], codebook [G, K, D], mask [2, N] with a third of the positions masked."""
    (x, codebook), groups = BATCHES[name]()
    x = torch.stack([torch.stack([x.roll(b + g, 0) for g in range(groups)]) for b in range(2)])
    mask = torch.arange(2 * x.shape[2]).view(2, -1) % 3 != 1
    return x.to(dtype), torch.stack([codebook.roll(g, 0) for g in range(groups)]), mask


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", BATCHES)
def test_border_outputs(backend, name, metric, masked):
    x, codebook, mask = batch(name)
    verify_border(backend, x, codebook, mask if masked else None, metric)


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(backend, dtype, codebook_dtype):
    x, codebook, mask = batch("plain", dtype)
    verify_border(backend, x, codebook.to(codebook_dtype), mask)


@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
def test_dims(backend, dim):
    x, codebook = cases.clustered(26, 33, dim, seed=dim)
    verify_border(backend, x.view(2, 1, 13, dim), codebook[None])


@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides(backend, view):
    x, codebook, mask = cases.normal(2, 24, 9, seed=6), cases.normal(1, 40, 9, seed=7), torch.arange(48).view(24, 2).T % 5 > 0
    verify_border(backend, cases.views(x)[view].unsqueeze(1), codebook, mask)
    heads = cases.views(cases.normal(2, 24, 12, seed=8))[view].unflatten(-1, (2, 6)).transpose(1, 2)
    verify_border(backend, heads, cases.normal(2, 40, 6, seed=9), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 64])
def test_images(backend, dim, dtype):
    """Channels-first, more rows than are turned around together, and neither rows nor coordinates a multiple of four."""
    image = cases.normal(3, 2 * dim, 15, 11, seed=dim).to(dtype)
    image[1, 0, 7, 5] = math.nan
    x = image.flatten(2).transpose(1, 2).unflatten(-1, (2, dim)).transpose(1, 2)  # [3, 2, 165, dim], a view
    assert dim == 1 or x.stride(2) == 1
    verify_border(backend, x, cases.normal(2, 40, dim, seed=9), torch.arange(3 * 165).view(3, 165) % 7 > 0)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("layout", ["rows", "channels_first"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_taken_exactly(backend, dtype, layout):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()].view(-1, 2, 1, 8)[:: 1 if backend == "cpu" else 61].permute(1, 2, 0, 3)
    x = values if layout == "rows" else values.transpose(2, 3).contiguous().transpose(2, 3)
    rows = x.shape[0] * x.shape[2]
    sums, _ = op("code_stats", backend)(*put(backend, x, torch.arange(rows).view(2, 1, -1)), rows)
    same(sums[0].cpu(), values.reshape(rows, 8).float())


@pytest.mark.parametrize("layout", ["rows", "channels_first"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_codes_are_rounded_to_the_nearest_half(backend, dtype, layout):
    """Ties, subnormals, the largest and what is beyond it: as torch rounds. A second column tells the codes apart."""
    halves = torch.arange(0, 2**15, 37 if backend == "cpu" else 1999).to(torch.int16).view(dtype)
    halves = torch.cat((halves[halves.float() <= 60000], torch.tensor([65504.0, 2.0**-24, 2.0**-14, 2.0**-126]).to(dtype)))
    bits = halves.float().view(torch.int32)
    half_step = torch.where(halves.float() < 2.0**-14, 2.0**-25, 0.0) if dtype == torch.float16 else torch.zeros(len(bits))
    near = [halves.float() + half_step]  # ties of subnormals; for the others, values about the middle between two
    step = 1 << (13 if dtype == torch.float16 else 16)
    near += [(bits + offset).view(torch.float32) for offset in (0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1)]
    values = torch.cat([*near, torch.tensor([65519.99, 65520.0, 65536.0])]) * torch.tensor([1.0, -1.0])[:, None]
    size, apart = (1024, 32.0) if dtype == torch.float16 else (128, 1024.0)  # which both types hold exactly
    for chunk in values.reshape(-1).split(size):
        codebook = torch.stack((chunk, apart * torch.arange(len(chunk))), -1)[None]
        x = codebook.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)[None]
        x = x if layout == "rows" else x.transpose(2, 3).contiguous().transpose(2, 3)
        quantized, _, indices, *_ = border(backend, x, codebook)
        same_bits(quantized, codebook[0, indices[0, 0]].to(dtype)[None, None])
        assert len(indices.unique()) == len(chunk)


def test_statistics_can_be_left_out(backend):
    x, codebook, mask = batch("plain")
    full, lean = border(backend, x, codebook, mask), border(backend, x, codebook, mask, with_sums=False)
    assert lean[3].numel() == 0
    for index in (0, 1, 2, 4, 5):
        same_bits(lean[index], full[index])


def test_masked_values_change_nothing(backend):
    """NaN, Inf and huge numbers under the mask leave every output as if zeros stood there."""
    x, codebook, mask = batch("groups")
    dirty = x.clone()
    dirty.transpose(1, 2)[~mask] = torch.tensor([math.nan, math.inf, -1e38]).repeat(3)
    clean = x.clone()
    clean.transpose(1, 2)[~mask] = 0.0
    for got, expected in zip(border(backend, dirty, codebook, mask), border(backend, clean, codebook, mask)):
        same_bits(got, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_agrees_with_its_parts(backend, masked):
    """The fused step gives the bits of nearest, gather and code_stats called one after the other."""
    x, codebook, mask = batch("nonfinite_rows_and_codes")
    mask = mask if masked else None
    quantized, _, indices, sums, counts, _ = border(backend, x, codebook, mask)
    found = vqfast.nearest(*put(backend, x, codebook), backend=backend).indices.cpu()
    same(indices, found if mask is None else torch.where(mask[:, None], found, -1))
    finite = torch.isfinite(x).all(-1)
    same(quantized[finite], vqfast.gather(*put(backend, codebook, indices), backend=backend).cpu()[finite])
    same(counts, op("code_stats", "reference")(x, indices, codebook.shape[1])[1])


# ---- the public function ------------------------------------------------------------------------------------------


def public(backend, x, codebook, mask=None, **options):
    return vqfast.vector_quantize(*put(backend, x, codebook), mask=put(backend, mask), backend=backend, **options)


@pytest.mark.parametrize("weight", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("metric", METRICS)
def test_losses_perplexity_and_usage(backend, metric, masked, weight):
    x, codebook, mask = (t[:, 0] if t.dim() == 4 else t for t in batch("nonfinite_rows"))
    out = public(backend, x, codebook[0], mask if masked else None, metric=metric, commitment_weight=weight)
    expected = oracle.step(x[:, None], codebook[:1], mask if masked else None, metric)
    bound = loss_bound(expected.mse, x.shape[-1])
    close(out.commitment_loss, torch.tensor(expected.mse), bound, "commitment")
    close(out.codebook_loss, torch.tensor(expected.mse), bound, "codebook")
    close(out.loss, torch.tensor((1 + weight) * expected.mse), (1 + weight) * bound + 4 * ULP * expected.mse, "loss")
    # exp of a sum of up to K rounded terms p log p, each below 1/e: absolute error of the entropy K ULP, relative of exp.
    close(out.perplexity, torch.tensor(oracle.perplexity(expected.counts[0])), 100 * ULP * oracle.perplexity(expected.counts[0]))
    close(out.usage, torch.tensor(oracle.usage(expected.counts[0])), ULP)
    assert out.nonfinite.item() == expected.nonfinite and out.nonfinite.dtype == torch.int64
    for name in ("loss", "commitment_loss", "codebook_loss", "perplexity", "usage"):
        value = getattr(out, name)
        assert value.dim() == 0 and value.dtype == torch.float32, name


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 1, 2, 3)], ids=str)
def test_leading_axes(backend, lead):
    x, codebook = cases.normal(*lead, 6, seed=10), cases.normal(9, 6, seed=11)
    mask = (torch.arange(math.prod(lead)) % 4 > 0).reshape(lead)
    out = public(backend, x, codebook, mask)
    expected = oracle.step(x.reshape(1, 1, mask.numel(), 6), codebook[None], mask.reshape(1, -1))
    same(out.indices, expected.indices.reshape(lead))
    same(out.quantized, expected.quantized.float().reshape(x.shape))


def test_groups_share_one_mask(backend):
    x, codebook, mask = batch("groups")
    out = public(backend, x, codebook, mask)
    expected = oracle.step(x, codebook, mask)
    same(out.indices, expected.indices), same(out.quantized, expected.quantized.float())
    close(out.commitment_loss, torch.tensor(expected.mse), loss_bound(expected.mse, x.shape[-1]))
    assert 1 <= out.perplexity.item() <= codebook.shape[1] and 0 < out.usage.item() <= 1


def test_uniform_use_gives_perplexity_k(backend):
    codebook = cases.integers(64, 12, seed=12)
    out = public(backend, codebook.repeat(3, 1), codebook)
    assert out.perplexity.item() == pytest.approx(64, rel=100 * ULP) and out.usage.item() == 1
    assert out.loss.item() == 0


NOTHING = {
    "no_rows": lambda: (torch.empty(2, 0, 5), None, 0),
    "all_masked": lambda: (cases.normal(2, 6, 5), torch.zeros(2, 6, dtype=torch.bool), 0),
    "all_nonfinite": lambda: (torch.full((2, 6, 5), math.nan), None, 12),
    "masked_or_nonfinite": lambda: (torch.full((2, 6, 5), -math.inf), torch.arange(12).view(2, 6) % 2 == 0, 6),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_valid(backend, name):
    x, mask, nonfinite = NOTHING[name]()
    x, codebook, mask = put(backend, x, cases.normal(7, 5, seed=13), mask)
    x.requires_grad_(), codebook.requires_grad_()
    out = vqfast.vector_quantize(x, codebook, mask=mask, backend=backend)
    assert [out.loss.item(), out.commitment_loss.item(), out.codebook_loss.item()] == [0, 0, 0]
    assert out.perplexity.item() == 1 and out.usage.item() == 0 and out.nonfinite.item() == nonfinite
    assert out.indices.shape == x.shape[:-1] and out.quantized.shape == x.shape
    out.loss.backward()
    assert (x.grad == 0).all() and (codebook.grad == 0).all()


# ---- gradients ----------------------------------------------------------------------------------------------------


def exact_gradients(x, codebook, mask, metric, upstream, commitment, codebook_factor):
    """float64 autograd of the written formulas on the oracle's indices; bad rows are taken out by hand."""
    found = oracle.step(x, codebook, mask, metric)
    used = (found.indices >= 0) & torch.isfinite(x).all(-1)
    rows, codes = x.double().nan_to_num(0, 0, 0).requires_grad_(), codebook.double().requires_grad_()
    groups = torch.arange(codebook.shape[0])[:, None].expand(found.indices.shape)
    picked = codes[groups, found.indices.clamp(min=0)]
    straight = rows + (picked - rows).detach()
    n = max(int(used.sum()), 1) * x.shape[-1]
    total = (straight * upstream.double())[used].sum()
    total = total + commitment * (rows - picked.detach()).square()[used].sum() / n
    total = total + codebook_factor * (rows.detach() - picked).square()[used].sum() / n
    total.backward()
    return rows.grad, codes.grad, used, n, found


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("term", ["straight_through", "commitment_loss", "codebook_loss", "loss", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, metric", [("groups", "l2"), ("groups", "cosine"), ("groups", "dot"),
                                          ("nonfinite_rows_and_codes", "l2"), ("offset", "l2")])  # fmt: skip
def test_gradients_match_float64_autograd(backend, name, metric, dtype, term, masked):
    """Each term alone, then all of them: one that leaks to the wrong side shows as a gradient where zero belongs."""
    x, codebook, mask = batch(name, dtype)
    mask = mask if masked else None
    upstream = cases.normal(*x.shape, seed=14).to(dtype) * (term in ("straight_through", "all"))
    commitment = {"commitment_loss": 1.0, "loss": 0.75, "all": 0.75}.get(term, 0.0)
    codebook_factor = {"codebook_loss": 1.0, "loss": 1.0, "all": 1.0}.get(term, 0.0)
    to_x, to_codes, used, n, found = exact_gradients(x, codebook, mask, metric, upstream, commitment, codebook_factor)

    rows, codes, flags, factor = put(backend, x.clone(), codebook.clone(), mask, upstream)
    rows.requires_grad_(), codes.requires_grad_()
    out = vqfast.vector_quantize(rows, codes, mask=flags, metric=metric, commitment_weight=0.75, backend=backend)
    if term in ("straight_through", "all"):
        out.quantized.backward(factor, retain_graph=True)
    if term != "straight_through":
        getattr(out, "loss" if term == "all" else term).backward()
    dx = torch.zeros_like(x) if rows.grad is None else rows.grad.cpu()
    dc = torch.zeros_like(codebook) if codes.grad is None else codes.grad.cpu()
    assert dx.dtype == dtype and dc.dtype == codebook.dtype

    step = commitment * 2 / n * (x.double() - found.quantized).abs().nan_to_num()
    bound = 8 * ULP * step + 3 * UNIT[dtype] * (step + upstream.double().abs() + to_x.abs()) + 2.0**-24 * (dtype == torch.float16)
    if term == "straight_through":
        bound = 0.0
    close(dx[used], to_x[used], torch.as_tensor(bound).expand(x.shape)[used], "gradient to x")
    if mask is not None:
        assert (dx.transpose(1, 2)[~mask] == 0).all(), "masked positions get gradient 0"
    if term not in ("straight_through", "all"):
        assert (dx[~used] == 0).all(), "non-finite rows enter no loss"

    sums = oracle.sums_bound(x.nan_to_num(0, 0, 0), found.indices, codebook.shape[1])
    size = found.counts[..., None] * codebook.double().abs().nan_to_num(0, 0, 0) + found.sums.abs()
    bound = codebook_factor * 2 / n * (sums + 6 * ULP * size)
    used_codes = found.counts > 0
    close(dc[used_codes], to_codes[used_codes], torch.as_tensor(bound).expand(dc.shape)[used_codes], "gradient to codes")
    assert (dc[~used_codes] == 0).all(), "codes that nobody chose get gradient 0, also those that are not finite"


def test_straight_through_is_the_identity_bit_for_bit(backend):
    x, codebook, mask = batch("groups", torch.bfloat16)
    upstream = cases.normal(*x.shape, seed=15).bfloat16()
    rows, codes, flags, factor = put(backend, x, codebook, mask, upstream)
    out = vqfast.vector_quantize(rows.requires_grad_(), codes.requires_grad_(), mask=flags, backend=backend)
    out.quantized.backward(factor)
    same(rows.grad, upstream * mask[:, None, :, None])
    assert codes.grad is None or (codes.grad == 0).all()


@pytest.mark.parametrize("wants", ["x", "codebook"])
def test_one_side_alone(backend, wants):
    x, codebook = put(backend, *cases.clustered(20, 9, 4))
    (x if wants == "x" else codebook).requires_grad_()
    out = vqfast.vector_quantize(x, codebook, backend=backend)
    out.loss.backward()
    leaf, other = (x, codebook) if wants == "x" else (codebook, x)
    assert (leaf.grad != 0).any() and other.grad is None
    assert not any(t.requires_grad for t in (out.indices, out.perplexity, out.usage, out.nonfinite))


def test_codes_may_change_before_backward(backend):
    """An EMA update between forward and backward moves the codes; the gradient is that of the forward's codes."""
    x, codebook = put(backend, *cases.clustered(20, 9, 4))
    x.requires_grad_()
    picked = codebook[vqfast.nearest(x, codebook, backend=backend).indices].clone()
    out = vqfast.vector_quantize(x, codebook, backend=backend)
    codebook.add_(100.0)
    out.commitment_loss.backward()
    exact = 2 / x.numel() * (x.detach().double() - picked.double())
    close(x.grad, exact, 6 * ULP * exact.abs().cpu())


@pytest.mark.parametrize("side", ["x", "codebook"])
def test_gradcheck_of_the_border(side):
    """sq_error holds one number twice: entry 0 is differentiable in x, entry 1 in the codebook."""
    x, codebook = (t.double() for t in cases.clustered(8, 5, 3, seed=16))
    x, codebook = x.view(1, 2, 4, 3), codebook[None].repeat(2, 1, 1)
    entry = 0 if side == "x" else 1

    def error(leaf):
        inputs = (leaf, codebook) if side == "x" else (x, leaf)
        return op("quantize", "reference")(*inputs, None, 0, True, None, None, None)[1][entry]

    leaf = (x if side == "x" else codebook).clone().requires_grad_()
    assert torch.autograd.gradcheck(error, (leaf,))


def test_double_backward_is_right_or_refused(backend):
    """d2 commitment / dx2 is 2 / (n D); a silent zero would spoil whoever differentiates twice."""
    x, codebook = put(backend, *cases.clustered(10, 5, 3, seed=17))
    x.requires_grad_()
    out = vqfast.vector_quantize(x, codebook, backend=backend)
    try:
        (first,) = torch.autograd.grad(out.commitment_loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum() + 0 * x.sum(), x)
    except RuntimeError:
        return
    close(second, torch.full_like(second, 2 / x.numel()), 4 * ULP * 2 / x.numel())


# ---- determinism --------------------------------------------------------------------------------------------------


def test_every_output_and_gradient_has_the_same_bits_for_any_thread_count(backend, set_threads):
    x, codebook = cases.clustered(5000, 60, 7, seed=18)
    x = (x * torch.exp2(8 * cases.normal(5000, 1, seed=19))).view(2, 1, 2500, 7)
    x[0, 0, 5] = math.nan
    mask = torch.arange(5000).view(2, 2500) % 7 > 0

    def run(count):
        set_threads(count)
        rows, codes, flags = put(backend, x.clone(), codebook[None].clone(), mask)
        out = vqfast.vector_quantize(rows.requires_grad_(), codes.requires_grad_(), mask=flags, backend=backend)
        (out.loss + out.quantized.nan_to_num().square().mean()).backward()
        return [*out, rows.grad, codes.grad, *border(backend, x, codebook[None], mask)]

    first = run(1)
    for count in (1, 2, 3, 5):
        for at, (again, before) in enumerate(zip(run(count), first)):
            same_bits(again, before, f"{count} threads, value {at}")


@pytest.mark.parametrize("codes", [48, 2048], ids=["dense", "pruned"])
def test_squared_error_adds_up_the_distances_on_cpu(codes):
    """Float32 distances of like size add up exactly in float64, in any order: no split of the rows can show in the sum."""
    mix = cases.normal(4, 24, seed=960)
    x, codebook = (cases.normal(n, 4, seed=n) @ mix + 0.05 * cases.normal(n, 24, seed=n + 1) for n in (4096, codes))
    distance, _ = op("nearest", "cpu")(x[None, None], codebook[None], 0, None, None, None)
    sq_error = border("cpu", x[None, None], codebook[None])[1]
    assert sq_error.tolist() == [distance.to(torch.float64).sum().item()] * 2


def test_integer_rows_give_exact_statistics_for_any_split(backend):
    x, codebook = cases.integers(1, 1, 200, 6, seed=20), cases.integers(1, 50, 6, seed=21)
    whole = border(backend, x, codebook)
    parts = [border(backend, part, codebook) for part in x.tensor_split((1, 12, 77), dim=2)]
    same(sum(p[3] for p in parts), whole[3]), same(sum(p[4] for p in parts), whole[4])
    same(sum(p[1] for p in parts), whole[1])

"""Quantizer layers: layouts, losses, gradients, masks, dtypes (contract 1, 3, 5, 7, 8, 10, 11)."""

import math
import re

import cases
import oracle
import pytest
import torch
from check import ULP, close, device_of, no_interpreter, put, same, same_bits
from layers import CODES, DIM, KINDS, LAYOUTS, codes_of, index_shape, make, rows_of

import vqfast

FAMILY = "quantize"
KIND = pytest.mark.parametrize("kind", KINDS)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def on_backend(backend):
    """Layers choose by themselves; here every choice is forced in turn."""
    no_interpreter(backend)
    with vqfast.use_backend(backend):
        yield


def example(layout, seed=1, dtype=torch.float32):
    shape, channel_dim = LAYOUTS[layout]
    return cases.normal(*shape, seed=seed).to(dtype), channel_dim


def mask_for(z, channel_dim):
    shape = z.movedim(channel_dim, -1).shape[:-1]
    return torch.arange(math.prod(shape)).reshape(shape) % 3 > 0


def on(backend, layer, *tensors):
    return layer.to(device_of(backend)), *(put(backend, t) for t in tensors)


# ---- layouts ------------------------------------------------------------------------------------------------------


@LAYOUT
@KIND
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_layout(backend, kind, layout, groups, masked):
    z, channel_dim = example(layout)
    mask = mask_for(z, channel_dim) if masked else None
    layer = make(kind, channel_dim=channel_dim, groups=groups)
    rows = rows_of(z, channel_dim, groups)
    expected = oracle.step(rows, codes_of(layer), None if mask is None else mask.reshape(rows.shape[0], -1))
    layer, ours, flags = on(backend, layer, z, mask)
    out = layer(ours, flags)
    same(out.indices, expected.indices.reshape(index_shape(z, channel_dim, groups)), "indices")
    same(rows_of(out.quantized.cpu(), channel_dim, groups), expected.quantized.float(), "quantized")
    assert out.quantized.shape == z.shape and out.quantized.dtype == z.dtype


@LAYOUT
@KIND
@pytest.mark.parametrize("groups", [1, 3])
def test_encode_and_decode(backend, kind, layout, groups):
    z, channel_dim = example(layout)
    layer, ours = on(backend, make(kind, channel_dim=channel_dim, groups=groups).eval(), z)
    out = layer(ours)
    indices = layer.encode(ours)
    same(indices, out.indices), same(layer.decode(indices), out.quantized)
    assert indices.dtype == torch.int64 and not indices.requires_grad


@KIND
def test_decode_maps_holes_to_zeros_and_refuses_other_indices(backend, kind):
    layer, indices = on(backend, make(kind, channel_dim=1).eval(), torch.tensor([[[0, -1], [CODES - 1, 3]]]))
    decoded = layer.decode(indices)
    assert decoded.shape == (1, DIM, 2, 2) and (decoded[0, :, 0, 1] == 0).all()
    same(decoded[0, :, 1, 0], codes_of(layer)[0, CODES - 1])
    for wrong in (CODES, -2, 2**32):
        if indices.is_cuda:
            break
        with pytest.raises(IndexError):
            layer.decode(torch.full_like(indices, wrong))


@KIND
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_leaves_lies_as_what_came(backend, kind, layout):
    """So that convolutions around a layer find their own layout, forward and backward."""
    z, upstream = (cases.normal(2, DIM, 12, 11, seed=s).to(memory_format=layout) for s in (2, 3))
    layer, ours, factor = on(backend, make(kind, channel_dim=1), z, upstream)
    out = layer(ours.requires_grad_())
    assert out.quantized.stride() == z.stride()
    seen = []
    ours.register_hook(lambda grad: seen.append(grad.stride()))  # before it is accumulated, which would set it right
    ((out.quantized * factor).sum() + out.loss).backward()
    assert seen == [z.stride()]


@KIND
@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides(backend, kind, view):
    z = cases.normal(2, 24, DIM, seed=2)
    layer, plain, strided = on(backend, make(kind).eval(), z, cases.views(z)[view])
    for a, b in zip(layer(strided), layer(plain)):
        same(a, b)


@KIND
def test_codebook_dim_projects_in_and_out(backend, kind):
    z = cases.normal(3, 7, DIM, seed=3)
    layer, ours = on(backend, make(kind, codebook_dim=2).eval(), z)
    out = layer(ours)
    assert layer.codebook.shape[-1] == 2 and out.quantized.shape == z.shape
    same(layer.decode(out.indices), out.quantized), same(layer.encode(ours), out.indices)


@KIND
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_metrics(backend, kind, metric):
    """Of cosine the index alone is fixed by the contract; scaling z must not change it."""
    z = cases.normal(40, DIM, seed=4)
    layer, ours = on(backend, make(kind, metric=metric).eval(), z)
    out = layer(ours)
    if metric == "dot":
        same(out.indices, oracle.nearest(z, codes_of(layer).cpu()[0], metric).indices)
    same(layer(4 * ours).indices, out.indices)


# ---- losses and gradients -----------------------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_loss_is_its_terms(backend, kind, weight):
    """loss = codebook_loss + weight * commitment_loss; with a moving-average codebook there is no codebook loss."""
    z = cases.normal(50, DIM, seed=5)
    layer = make(kind, commitment_weight=weight)
    expected = oracle.step(z[None, None], codes_of(layer))
    layer, ours = on(backend, layer, z)
    out = layer(ours)
    bound = (DIM + 4) * ULP * expected.mse
    close(out.commitment_loss, torch.tensor(expected.mse), bound)
    close(out.codebook_loss, torch.tensor(expected.mse * (kind == "parameter")), bound)
    close(out.loss, torch.tensor((weight + (kind == "parameter")) * expected.mse), (weight + 1) * bound + 4 * ULP * expected.mse)
    close(out.perplexity, torch.tensor(oracle.perplexity(expected.counts[0])), 100 * ULP * CODES)
    close(out.usage, torch.tensor(oracle.usage(expected.counts[0])), ULP)
    assert out.nonfinite.item() == 0


@KIND
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients(backend, kind, masked):
    """The gradient belongs to the codes of the forward, although a moving-average codebook has moved by then."""
    z, upstream = cases.normal(2, DIM, 4, 5, seed=6), cases.normal(2, DIM, 4, 5, seed=7)
    mask = mask_for(z, 1) if masked else None
    layer = make(kind, channel_dim=1, commitment_weight=0.5)
    codes, rows = codes_of(layer), rows_of(z, 1).double()
    expected = oracle.step(rows.float(), codes, None if mask is None else mask.reshape(2, -1))
    layer, ours, flags, factor = on(backend, layer, z, mask, upstream)
    ours.requires_grad_()
    out = layer(ours, flags)
    (out.loss + (out.quantized * factor).sum()).backward()

    valid = (expected.indices >= 0)[..., None]
    n = int(valid.sum()) * DIM
    difference = torch.where(valid, rows - expected.quantized, 0.0)
    wanted = torch.where(valid, rows_of(upstream, 1).double() + 0.5 * 2 / n * difference, 0.0)
    close(rows_of(ours.grad.cpu(), 1), wanted, 8 * ULP * (difference.abs() / n + rows_of(upstream, 1).abs()))
    if kind == "parameter":
        to_codes = 2 / n * (expected.counts[..., None] * codes - expected.sums)
        size = 2 / n * (expected.counts[..., None] * codes.abs() + expected.sums.abs())
        bound = 2 / n * oracle.sums_bound(rows.float(), expected.indices, CODES) + 8 * ULP * size
        close(layer.codebook.grad.reshape(codes.shape), to_codes, bound)
    else:
        assert not layer.codebook.requires_grad and not list(layer.parameters())


@KIND
def test_straight_through_in_eval_too(backend, kind):
    layer, z, upstream = on(backend, make(kind).eval(), cases.normal(9, DIM, seed=8), cases.normal(9, DIM, seed=9))
    z.requires_grad_()
    layer(z).quantized.backward(upstream)
    same_bits(z.grad, upstream)


# ---- masks, bad rows, nothing at all ------------------------------------------------------------------------------


@KIND
def test_masked_rows_change_nothing(backend, kind):
    """Whatever stands under the mask, and whether those rows exist at all, the step is the same."""
    z, mask = cases.integers(1, 30, DIM, seed=10), torch.arange(30)[None] % 3 > 0
    codebook = cases.integers(CODES, DIM, seed=11)

    def step(rows, flags):
        layer, ours, flags = on(backend, make(kind, codebook), rows, flags)
        out = layer(ours.requires_grad_(), flags)
        out.loss.backward()
        return layer, out, ours.grad

    bare, short, _ = step(z[mask][None], None)
    for value in (0.0, math.nan, math.inf, 1e38):
        layer, out, grad = step(torch.where(mask[..., None], z, torch.tensor(value)), mask)
        assert (out.indices.cpu()[~mask] == -1).all() and (out.quantized.cpu()[~mask] == 0).all()
        assert (grad.cpu()[~mask] == 0).all() and out.nonfinite.item() == 0
        for name in ("loss", "perplexity", "usage"):
            same_bits(getattr(out, name), getattr(short, name), f"{name} with {value} under the mask")
        same_bits(layer.codebook, bare.codebook)


@KIND
def test_nonfinite_rows_change_nothing_and_are_counted(backend, kind):
    z, bad = cases.integers(1, 30, DIM, seed=12), torch.arange(30) % 5 == 0
    codebook = cases.integers(CODES, DIM, seed=13)
    dirty = z.clone()
    dirty[0, bad, 2] = torch.tensor([math.nan, math.inf]).repeat(3)
    layer, ours, clean = on(backend, make(kind, codebook), dirty, z[:, ~bad])
    out = layer(ours)
    other = make(kind, codebook).to(ours.device)
    short = other(clean)
    assert out.nonfinite.item() == 6 and (out.indices.cpu()[0, bad] == 0).all()
    assert out.quantized.cpu()[0, bad].isnan().all(), "the model's own loss shows it"
    for name in ("loss", "perplexity", "usage"):
        same_bits(getattr(out, name), getattr(short, name), name)
    same_bits(layer.codebook, other.codebook)
    assert torch.isfinite(layer.codebook).all()


EMPTY = {
    "no_rows": (torch.empty(0, 5, DIM), None),
    "no_positions": (torch.empty(2, 0, DIM), None),
    "all_masked": (cases.normal(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool)),
    "all_nonfinite": (torch.full((2, 5, DIM), math.nan), None),
}


@KIND
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_valid(backend, kind, name, groups):
    layer, z, mask = on(backend, make(kind, groups=groups), *EMPTY[name])
    z = z.clone().requires_grad_()
    out = layer(z, mask)
    assert out.loss.item() == 0 and out.perplexity.item() == 1 and out.usage.item() == 0
    assert out.quantized.shape == z.shape and out.indices.numel() == groups * z.shape[0] * z.shape[1]
    out.loss.backward()
    assert (z.grad == 0).all()


# ---- dtypes -------------------------------------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rows(backend, kind, dtype):
    z = cases.normal(40, DIM, seed=14).to(dtype)
    layer = make(kind)
    expected = oracle.step(z[None, None], codes_of(layer))
    layer, ours = on(backend, layer, z)
    out = layer(ours)
    same(out.indices, expected.indices[0, 0]), same(out.quantized, expected.quantized[0, 0].to(dtype))
    assert out.loss.dtype == torch.float32


@KIND
@pytest.mark.parametrize("move", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.to(dtype=torch.bfloat16),
    lambda m: m.to("cpu", torch.float16), lambda m: torch.nn.Sequential(m).half()[0], lambda m: m.half().float().bfloat16(),
], ids=["half", "bfloat16", "to_half", "to_bfloat16", "to_cpu_half", "inside_a_model", "to_and_fro"])  # fmt: skip
def test_state_keeps_its_precision(kind, move):
    """Codes with 24 bits survive .half(); the rest of the model may go where it likes."""
    layer = make(kind, codebook_dim=3)
    before = codes_of(layer)
    layer = move(layer)
    state = {name: t for name, t in layer.state_dict().items() if "project" not in name and t.is_floating_point()}
    assert state and all(t.dtype == torch.float32 for t in state.values()), {n: t.dtype for n, t in state.items()}
    same_bits(codes_of(layer), before)
    low = next(layer.project_in.parameters()).dtype
    assert low != torch.float32, "the projection follows the model"
    out = layer(cases.normal(9, DIM).to(low))
    assert out.quantized.dtype == low and torch.isfinite(out.loss)


@KIND
def test_double_keeps_full_precision(kind):
    """.double() may keep float32 codes or widen them; either way float64 rows are looked up exactly."""
    layer = make(kind).double()
    z = cases.normal(30, DIM, seed=15).double() / 3
    expected = oracle.step(z[None, None], codes_of(layer))
    with vqfast.use_backend("reference"):
        out = layer(z)
    assert layer.codebook.dtype in (torch.float32, torch.float64) and out.quantized.dtype == torch.float64
    same(out.indices, expected.indices[0, 0])


@KIND
def test_autocast_changes_no_code_and_no_state(backend, kind):
    z = cases.normal(40, DIM, seed=16)
    (plain, ours), mixed = on(backend, make(kind), z), make(kind).to(device_of(backend))
    expected = plain(ours)
    with torch.autocast(ours.device.type, dtype=torch.bfloat16):
        out = mixed(ours)
    for a, b in zip(out, expected):
        same_bits(a, b)
    same_bits(mixed.codebook, plain.codebook)


# ---- errors -------------------------------------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("shape, channel_dim", [((2, DIM, 4, 5), -1), ((2, 4, 5, DIM), 1), ((2, 7, DIM), 1), ((7, DIM), 0)])
def test_wrong_channel_dim_names_the_one_that_fits(kind, shape, channel_dim):
    with pytest.raises(ValueError) as caught:
        make(kind, channel_dim=channel_dim)(torch.zeros(shape))
    named = re.findall(r"channel_dim\D*?(-?\d)", str(caught.value))
    assert named and int(named[-1]) % len(shape) == shape.index(DIM), str(caught.value)


@KIND
def test_wrong_inputs(kind):
    layer = make(kind)
    for z in (torch.zeros(3, DIM + 1), torch.zeros(DIM), torch.tensor(0.0), torch.zeros(3, DIM).long(), None):
        with pytest.raises((ValueError, TypeError)):
            layer(z)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(3), torch.ones(3, DIM, dtype=torch.bool)):
        with pytest.raises((ValueError, TypeError), match="mask"):
            layer(torch.zeros(3, DIM), mask)


@KIND
@pytest.mark.parametrize("options", [
    {"dim": 0}, {"dim": -2}, {"codebook_size": 0}, {"groups": 4}, {"groups": 0}, {"metric": "manhattan"}, {"codebook_dim": 0},
    {"commitment_weight": -1.0}, {"revive_below": -0.5}, {"commitment_weight": math.nan},
], ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))  # fmt: skip
def test_wrong_arguments(kind, options):
    with pytest.raises((ValueError, TypeError)) as caught:
        KINDS[kind](**{"dim": DIM, "codebook_size": CODES, **options})
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize("options", [{"decay": 1.5}, {"decay": -0.1}, {"eps": -1e-5}, {"rule": "adam"}], ids=lambda o: next(iter(o)))
def test_wrong_ema_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KINDS["ema"](DIM, CODES, **options)


@pytest.mark.parametrize("kind", ["parameter", "ema", "residual"])
def test_decode_gives_what_forward_gave(backend, kind):
    """With cosine a learned parameter leaves the unit sphere; the codes do not."""
    layer = make(kind, metric="cosine", **({"num_quantizers": 2} if kind == "residual" else {}))
    if kind == "parameter":
        layer.codebook.data *= torch.linspace(0.5, 2, len(layer.codebook))[:, None]
    layer, z = on(backend, layer.eval(), cases.normal(50, DIM, seed=1))
    out = layer(z)
    close(layer.decode(out.indices).detach(), out.quantized.detach().cpu(), 2e-6)
    same(layer.encode(z), out.indices)


PREPARED = {"cosine": {"metric": "cosine"}, "projected": {"codebook_dim": 4}, "in groups": {"metric": "cosine", "groups": 2}}


@pytest.mark.parametrize("options", PREPARED.values(), ids=PREPARED.keys())
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("kind", [*KINDS, "residual"])
def test_no_gradient_comes_from_rows_that_do_not_count(backend, kind, masked, options):
    """Behind a projection or a normalisation, too: there a gradient of 0 times a NaN would be NaN."""
    if kind == "residual":
        options = {"num_quantizers": 2} | {name: value for name, value in options.items() if name != "groups"}
    z, valid = cases.normal(2, 5, DIM, seed=1), torch.ones(2, 5, dtype=torch.bool)
    valid[0, 1] = valid[1, 3] = False
    broken = z.clone()
    broken[0, 1], broken[1, 3, 2::3] = torch.nan, torch.inf

    def gradients(values, mask):
        layer, values, mask = on(backend, make(kind, **options), values.clone(), mask)
        out = layer(values.requires_grad_(), mask)
        (out.quantized[valid].square().sum() + out.loss).backward()
        if mask is not None:
            assert not out.quantized[~valid].any(), "the bias of a projection stands at no masked position"
        return values.grad, *(p.grad for p in layer.parameters() if p.grad is not None)

    for got, expected in zip(gradients(broken, valid if masked else None), gradients(z, valid), strict=True):
        same(got, expected)

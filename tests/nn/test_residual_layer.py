"""ResidualVectorQuantizer: levels one after the other, any number of them, with an identity gradient (contract 10, 11)."""

import cases
import oracle
import pytest
import torch
from check import ULP, close, device_of, no_interpreter, put, same, same_bits
from layers import CODES, DIM, LAYOUTS, make

import vqfast
from vqfast.nn import ResidualVectorQuantizer

FAMILY = "residual"
LEVELS = 4


@pytest.fixture(autouse=True)
def on_backend(backend):
    no_interpreter(backend)
    with vqfast.use_backend(backend):
        yield


def layer_for(backend, **options):
    scale = 3.0 ** -torch.arange(LEVELS)[:, None, None]
    codebook = cases.normal(LEVELS, CODES, DIM, seed=40) * scale
    return make("residual", codebook, num_quantizers=LEVELS, **options).to(device_of(backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_the_loop_in_every_layout(backend, layout):
    shape, channel_dim = LAYOUTS[layout]
    z = cases.normal(*shape, seed=41)
    layer = layer_for(backend, channel_dim=channel_dim).eval()
    out = layer(put(backend, z))
    rows = z.movedim(channel_dim, -1)
    expected = oracle.residual_indices(rows.reshape(-1, DIM), layer.codebook.cpu())
    assert out.indices.shape == (*rows.shape[:-1], LEVELS) and out.quantized.shape == z.shape
    same(out.indices.reshape(-1, LEVELS), expected.T)
    same(layer.encode(put(backend, z)), out.indices)
    decoded = layer.decode(out.indices)
    assert decoded.shape == z.shape
    close(decoded, out.quantized, (LEVELS + 1) * ULP * (2 * z.abs() + 4))


@pytest.mark.parametrize("levels", range(1, LEVELS + 1))
def test_fewer_levels_are_a_prefix(backend, levels):
    z = put(backend, cases.normal(30, DIM, seed=42))
    layer = layer_for(backend).eval()
    out, full = layer(z, num_quantizers=levels), layer(z)
    same(out.indices[..., :levels], full.indices[..., :levels])
    assert (out.indices[..., levels:] == -1).all(), "levels that were not used carry -1"
    same(layer.encode(z, num_quantizers=levels), out.indices)
    close(layer.decode(out.indices), out.quantized, (LEVELS + 1) * ULP * 8)
    close(layer.decode(out.indices[..., :levels]), out.quantized, (LEVELS + 1) * ULP * 8)


def test_every_level_halves_what_is_left(backend):
    """More levels, less error, on codes that were made by k-means of the rests."""
    z = put(backend, cases.normal(600, DIM, seed=43))
    layer = layer_for(backend).eval()
    layer.init_codebook_(z)
    errors = [(layer(z, num_quantizers=q).quantized - z).square().mean().item() for q in range(1, LEVELS + 1)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("levels", [0, LEVELS + 1, -1])
def test_wrong_number_of_levels(backend, levels):
    with pytest.raises((ValueError, TypeError), match="num_quantizers"):
        layer_for(backend).eval()(put(backend, cases.normal(5, DIM)), num_quantizers=levels)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradient_of_quantized_is_the_identity(backend, training, masked):
    z, upstream = cases.normal(2, 15, DIM, seed=44), cases.normal(2, 15, DIM, seed=45)
    mask = torch.arange(30).view(2, 15) % 4 > 0 if masked else None
    layer = layer_for(backend).train(training)
    rows, flags, factor = put(backend, z, mask, upstream)
    layer(rows.requires_grad_(), flags).quantized.backward(factor)
    same(rows.grad, upstream if mask is None else upstream * mask[..., None])


def test_commitment_gradient_is_the_sum_of_the_levels(backend):
    z = cases.normal(30, DIM, seed=46)
    layer = layer_for(backend, commitment_weight=0.5)
    codebook = layer.codebook.detach().cpu().clone()
    rows = put(backend, z.clone()).requires_grad_()
    out = layer(rows)
    out.loss.backward()
    rest, gradient, mse = z, torch.zeros(30, DIM, dtype=torch.float64), 0.0
    for codes in codebook:
        difference = rest - oracle.gather(codes, oracle.nearest(rest, codes).indices)
        gradient += 2 * difference.double() / z.numel() / LEVELS
        mse += float(difference.double().square().mean()) / LEVELS
        rest = difference
    close(rows.grad, 0.5 * gradient, 16 * LEVELS * ULP * 2 * 4 / z.numel())
    close(out.loss, torch.tensor(0.5 * mse), 32 * ULP * mse)


def test_masked_and_nonfinite_rows_at_every_level(backend):
    z, mask = cases.normal(2, 15, DIM, seed=47), torch.arange(30).view(2, 15) % 4 > 0
    z[0, 1], z[1, 3, 2], z[0, 0] = torch.nan, torch.inf, torch.nan  # the last one is masked
    layer = layer_for(backend)
    out = layer(*put(backend, z, mask))
    bad = mask & ~torch.isfinite(z).all(-1)
    assert (out.indices.cpu()[~mask] == -1).all() and (out.quantized.cpu()[~mask] == 0).all()
    assert (out.indices.cpu()[bad] == 0).all() and out.quantized.cpu()[bad].isnan().all()
    assert out.nonfinite.item() == int(bad.sum()) and torch.isfinite(out.loss)
    assert all(torch.isfinite(t).all() for t in (layer.codebook, layer.cluster_size, layer.cluster_sum))
    clean = layer_for(backend)
    short = clean(put(backend, z[mask & ~bad][None]))
    close(layer.codebook, clean.codebook, 64 * ULP * (1 + clean.codebook.abs().cpu()))
    close(out.perplexity, short.perplexity, 64 * ULP * CODES)


def test_codebooks_of_unused_levels_do_not_move(backend):
    layer = layer_for(backend, decay=0.5)
    before = layer.codebook.detach().clone()
    layer(put(backend, cases.normal(40, DIM, seed=48)), num_quantizers=2)
    same_bits(layer.codebook[2:], before[2:])
    assert (layer.codebook[:2] != before[:2]).any(-1).any(-1).all()


def test_dropout_uses_every_number_of_levels_in_training_only(backend):
    layer = layer_for(backend, quantizer_dropout=1.0)
    z = put(backend, cases.normal(6, DIM, seed=49))
    torch.manual_seed(0)
    # 60 draws miss one of 4 numbers with probability below 4 * (3/4)^60 = 1.3e-7; the seed fixes the outcome.
    seen = {int((layer(z).indices[0] >= 0).sum()) for _ in range(60)}
    assert seen == set(range(1, LEVELS + 1))
    assert (layer.eval()(z).indices >= 0).all()


def test_dropout_follows_the_seed(backend):
    z = put(backend, cases.normal(6, DIM, seed=50))

    def draws():
        layer = layer_for(backend, quantizer_dropout=0.5)
        torch.manual_seed(3)
        return [int((layer(z).indices[0] >= 0).sum()) for _ in range(20)]

    assert draws() == draws()


@pytest.mark.parametrize("options", [{"num_quantizers": 0}, {"num_quantizers": 2, "quantizer_dropout": 1.5},
                                     {"num_quantizers": 2, "quantizer_dropout": -0.1}], ids=lambda o: list(o)[-1])  # fmt: skip
def test_wrong_arguments(options):
    with pytest.raises((ValueError, TypeError), match=list(options)[-1]):
        ResidualVectorQuantizer(DIM, CODES, **options)

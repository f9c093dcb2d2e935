"""Residual layers of vqfast.compat.vector_quantize_pytorch beside the library whose face they are."""

import oracle
import pytest
import torch
from side_by_side import assert_same, pair

BASE = {"dim": 16, "codebook_size": 32, "num_quantizers": 4}
TOKENS = (2, 64, 16)

LAYERS = {
    "default": {},
    "straight-through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 8},
    "sizes": {"codebook_size": (8, 16, 32, 4)},
    "shared": {"shared_codebook": True},
    "shared, dead codes": {"shared_codebook": True, "threshold_ema_dead_code": 2, "codebook_size": 8},
    "dropout": {"quantize_dropout": True},
    "dropout, multiples": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "gradient between levels": {"quant_grad_frac": 0.3, "rotation_trick": False},
    "diveq": {"diveq": True},
    # few codes, so that no cluster holds one row alone, whose rest is rounding noise
    "k-means, dead codes": {"kmeans_init": True, "threshold_ema_dead_code": 2, "codebook_size": 6},
    "stochastic": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.3},
    "implicit": {"implicit_neural_codebook": True},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_does_what_the_other_library_does(case, train):
    slow = case == "implicit"
    shape = (2, 8, 16) if slow else TOKENS
    # Where gradients feed back into what is searched, rounding grows until a near tie falls the other way.
    steps = {"implicit": 4, "diveq": 5, "projection": 10}.get(case, 20) if train else 2
    assert_same(*pair("ResidualVQ", **BASE | LAYERS[case]), shape, train=train, steps=steps)


DIVERSITY = {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0}


@pytest.mark.parametrize("chunk", [1 << 20, 32 * 16 * 3])
@pytest.mark.parametrize(
    "kwargs, shape",
    # not the cross entropy of single tokens, for which the other library fails
    [(DIVERSITY, (2, 8, 16)), (DIVERSITY, (12, 16)), ({"commitment_use_cross_entropy_loss": True}, (2, 8, 16))],
    ids=["diversity", "diversity, single tokens", "cross entropy"],
)
def test_losses_of_all_codes_of_an_implicit_codebook(kwargs, shape, chunk, monkeypatch):
    peer, ours = pair("ResidualVQ", **BASE, implicit_neural_codebook=True, **kwargs)
    monkeypatch.setattr("vqfast.compat.vector_quantize_pytorch._plain.CHUNK_SCORES", chunk)
    assert_same(peer, ours, shape, steps=2)


def test_cross_entropy_of_an_implicit_codebook():
    _, ours = pair("ResidualVQ", **BASE, implicit_neural_codebook=True)
    x = torch.randn(2, 8, 16)
    quantized, indices, _ = ours.eval()(x)
    again, entropy = ours(x, indices=indices)
    torch.testing.assert_close(again, quantized)
    assert entropy < ours(x, indices=(indices + 1) % 32)[1]


@pytest.mark.parametrize("dtype, train", [(torch.bfloat16, False), (torch.float64, False), (torch.float64, True)])
def test_other_precisions(dtype, train):
    """Not bfloat16 in training, where the other library's rotated codes are off by their rounding, and so is what is left over."""
    assert_same(*pair("ResidualVQ", **BASE), TOKENS, train=train, steps=2, dtype=dtype)


CALLS = {
    "all codes": {"return_all_codes": True, "freeze_codebook": True},
    "mask": {"mask": torch.arange(128).view(2, 64) % 3 > 0},
    "frozen": {"freeze_codebook": True},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CALLS)
def test_a_call_does_what_the_other_library_does(case, train):
    assert_same(*pair("ResidualVQ", **BASE), TOKENS, train=train, steps=5 if train else 2, **CALLS[case])


BEAMS = {
    "beams": ({"beam_size": 3}, {}),
    "weights": ({"beam_size": 2, "eval_beam_size": 4, "beam_score_quantizer_weights": [1.0, 0.5, 0.25, 0.1]}, {}),
    "dropout": ({"beam_size": 2, "quantize_dropout": True}, {}),
    "call": ({}, {"beam_size": 2}),
    "mask": ({}, {"beam_size": 2, "mask": torch.arange(128).view(2, 64) % 3 > 0}),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", BEAMS)
def test_beam_search_finds_what_the_other_library_finds(case, train):
    """One step: in training the other library then moves the first level's codebook only."""
    kwargs, call = BEAMS[case]
    assert_same(*pair("ResidualVQ", **BASE | kwargs), TOKENS, train=train, steps=1, state=False, **call)


def test_beam_search_teaches_every_level_what_it_was_given():
    peer, ours = pair("ResidualVQ", **BASE, beam_size=2)
    x, by_hand = torch.randn(TOKENS), pair("ResidualVQ", **BASE)[1]
    _, indices, _ = ours(x)
    peer(x)
    rest = x
    for level, layer in enumerate(by_hand.layers):
        codes = layer.codebook[indices[..., level]]
        layer.update_indices(rest, indices[..., level])
        rest = rest - codes
        torch.testing.assert_close(layer.codebook, ours.layers[level].codebook)
    torch.testing.assert_close(peer.layers[0].codebook, ours.layers[0].codebook)
    assert torch.equal(peer.layers[1]._codebook.cluster_size, torch.ones(1, 32))  # never moved


def test_wider_beams_come_nearer():
    _, ours = pair("ResidualVQ", **BASE)
    ours.eval()
    for layer in ours.layers:
        layer.codebook = torch.randn(32, 16) * 0.5
    x = torch.randn(1, 300, 16)
    errors = [(ours(x, beam_size=width)[0] - x).square().mean().item() for width in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0]
    one = ours(x, beam_size=1)
    assert torch.equal(one[1], ours(x)[1])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", [{}, {"quantize_dropout": True}, {"shared_codebook": True}, {"threshold_ema_dead_code": 2}], ids=str)
def test_groups(kwargs, train):
    assert_same(*pair("GroupedResidualVQ", **BASE, groups=2, **kwargs), TOKENS, train=train, steps=10 if train else 2)


@pytest.mark.parametrize("kwargs", [{}, {"quantize_dropout": True}, {"implicit_neural_codebook": True}], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_indices_give_the_output_back(kwargs, train):
    peer, ours = pair("ResidualVQ", **BASE, **kwargs)
    ours.train(train)
    x = torch.randn(2, 8, 16)
    quantized, indices, _ = ours(x, freeze_codebook=True)
    assert torch.allclose(ours.get_output_from_indices(indices), quantized, atol=1e-6)
    torch.testing.assert_close(ours.get_codes_from_indices(indices), peer.get_codes_from_indices(indices))
    if kwargs.get("quantize_dropout"):
        torch.testing.assert_close(ours.get_codes_from_indices(indices[..., :2])[:2], ours.get_codes_from_indices(indices)[:2])


@pytest.mark.parametrize("fused", [True, False])
def test_codes_are_those_of_float64(fused):
    _, ours = pair("ResidualVQ", dim=8, codebook_size=100, num_quantizers=3)
    ours.eval()
    x = torch.randn(1, 500, 8)
    # A learnable codebook takes the levels one by one.
    for layer in ours.layers if not fused else ():
        layer._codebook.embed.requires_grad_()
    quantized, indices, _ = ours(x)
    rest = x
    for level, codebook in enumerate(ours.codebooks):
        assert torch.equal(indices[..., level], oracle.nearest(rest, codebook.detach()).indices)
        rest = rest - codebook.detach()[indices[..., level]]
    torch.testing.assert_close(quantized.detach(), x - rest)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_every_level_passes_the_gradient_on(levels):
    """The convention of the other library: d quantized / d x is `levels` times the identity, where ours is the identity."""
    from vqfast.nn import ResidualVectorQuantizer

    peer, ours = pair("ResidualVQ", dim=4, codebook_size=8, num_quantizers=levels, rotation_trick=False)
    own = ResidualVectorQuantizer(4, 8, num_quantizers=levels)
    x = torch.randn(1, 5, 4)
    for layer, factor in ((peer, levels), (ours, levels), (own, 1)):
        given = x.clone().requires_grad_()
        quantized = layer(given)[0]
        quantized.backward(torch.ones_like(quantized))
        assert torch.equal(given.grad, torch.full_like(x, factor))

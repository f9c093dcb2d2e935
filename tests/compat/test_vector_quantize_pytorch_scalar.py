"""Scalar and binary quantizers of vqfast.compat.vector_quantize_pytorch beside the library whose face they are."""

import inspect

import pytest
import torch
from side_by_side import Fresh, assert_equal, assert_same, libraries, pair, tensors
from torch import nn

TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])

FSQ = {
    "default": ({"levels": [8, 5, 5, 5]}, (2, 50, 4)),
    "image": ({"levels": [8, 5, 5, 5]}, (2, 4, 6, 7)),
    "channels first": ({"levels": [8, 5, 5], "channel_first": True}, (2, 3, 20)),
    "projection": ({"levels": [4, 3], "dim": 6}, (2, 50, 6)),
    "no bias": ({"levels": [4, 3], "dim": 6, "projection_has_bias": False}, (2, 50, 6)),
    "codebooks": ({"levels": [8, 5], "num_codebooks": 3}, (2, 50, 6)),
    "codebooks, image": ({"levels": [8, 5], "num_codebooks": 3}, (2, 6, 4, 4)),
    "symmetric": ({"levels": [2, 8, 5], "preserve_symmetry": True}, (2, 50, 3)),
    "symmetric, noise": ({"levels": [8, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 50, 2)),
    "symmetric, noise, image": ({"levels": [8, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 2, 6, 7)),
    "hard clamp": ({"levels": [8, 5], "bound_hard_clamp": True}, (2, 50, 2)),
    "rotation": ({"levels": [5, 5, 5], "orthogonal_rotation": True}, (2, 50, 3)),
    "no indices": ({"levels": [8, 5], "return_indices": False}, (2, 50, 2)),
}


@TRAIN
@pytest.mark.parametrize("case", FSQ)
def test_fsq(case, train):
    kwargs, shape = FSQ[case]
    peer, ours = pair("FSQ", **kwargs)
    assert_same(peer, ours, shape, train=train, steps=5)
    x = torch.randn(shape)
    ours.eval()
    out, indices = ours(x)
    if indices is not None:
        torch.testing.assert_close(ours.indices_to_codes(indices), out)
        torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices))
        torch.testing.assert_close(ours.implicit_codebook, peer.implicit_codebook)


def test_fsq_counts_beyond_float32():
    """A float32 sum of the levels is exact to 2^24; the other library's indices of this layer are not."""
    _, ours = pair("FSQ", levels=[63, 63, 63, 63, 63], return_indices=False)
    codes = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    levels = ours._scale_and_shift(codes).long()[0]
    assert ours.codes_to_indices(codes).item() == sum(int(level) * 63**i for i, level in enumerate(levels))


RESIDUAL_FSQ = {
    "default": ({"levels": [8, 5, 5], "num_quantizers": 3}, (2, 50, 3)),
    "projection": ({"levels": [5, 5, 5], "num_quantizers": 4, "dim": 8}, (2, 50, 8)),
    "soft clamp": ({"levels": [5, 5], "num_quantizers": 2, "bound_hard_clamp": False, "soft_clamp_input_value": 2.0}, (2, 50, 2)),
    "dropout": ({"levels": [5, 5], "num_quantizers": 4, "quantize_dropout": True}, (2, 50, 2)),
    "channels first": ({"levels": [5, 5], "num_quantizers": 2, "is_channel_first": True}, (2, 2, 20)),
    "image": ({"levels": [5, 5], "num_quantizers": 2, "is_channel_first": True}, (2, 2, 4, 5)),
    "image, noise": ({"levels": [5, 5], "num_quantizers": 2, "is_channel_first": True, "noise_dropout": 0.5}, (2, 2, 4, 5)),
}


@TRAIN
@pytest.mark.parametrize("case", RESIDUAL_FSQ)
def test_residual_fsq(case, train):
    kwargs, shape = RESIDUAL_FSQ[case]
    peer, ours = pair("ResidualFSQ", **kwargs)
    assert_same(peer, ours, shape, train=train, steps=5)
    torch.testing.assert_close(ours.codebooks, peer.codebooks)
    ours.eval()
    out, indices, codes = ours(torch.randn(shape), return_all_codes=True)
    torch.testing.assert_close(ours.get_output_from_indices(indices), out)
    if not kwargs.get("is_channel_first"):
        torch.testing.assert_close(codes, peer.get_codes_from_indices(indices))


def test_grouped_residual_fsq():
    kwargs = {"dim": 12, "groups": 2, "levels": [5, 5, 5], "num_quantizers": 3}
    peer, ours = pair("GroupedResidualFSQ", **kwargs)
    assert_same(peer, ours, (2, 30, 12), steps=5, return_all_codes=True)
    out, indices = ours(torch.randn(2, 30, 12))
    torch.testing.assert_close(ours.get_output_from_indices(indices), out)


LFQ = {
    "default": ({"dim": 6}, (2, 50, 6)),
    "weights": ({"dim": 6, "entropy_loss_weight": 0.3, "commitment_loss_weight": 0.5, "diversity_gamma": 2.0}, (2, 50, 6)),
    "projection": ({"dim": 16, "codebook_size": 64}, (2, 50, 16)),
    "image": ({"dim": 6}, (2, 6, 5, 7)),
    "codebooks": ({"codebook_size": 16, "dim": 8, "num_codebooks": 2}, (2, 50, 8)),
    "codebooks, image": ({"codebook_size": 16, "dim": 8, "num_codebooks": 2}, (2, 8, 4, 5)),
    "spherical": ({"dim": 6, "spherical": True}, (2, 50, 6)),
    "soft clamp": ({"dim": 6, "soft_clamp_input_value": 3.0}, (2, 50, 6)),
    "softplus": ({"dim": 6, "experimental_softplus_entropy_loss": True}, (2, 50, 6)),
    "cosine projection": ({"dim": 16, "codebook_size": 64, "cosine_sim_project_in": True}, (2, 50, 16)),
    "rotation": ({"dim": 6, "orthogonal_rotation": True}, (2, 50, 6)),
    "share of the rows": ({"dim": 6, "frac_per_sample_entropy": 0.5}, (2, 50, 6)),
    "activation": ({"dim": 6, "straight_through_activation": nn.Tanh()}, (2, 50, 6)),
    "scale": ({"dim": 6, "codebook_scale": 0.5}, (2, 50, 6)),
}


@TRAIN
@pytest.mark.parametrize("chunk", [1 << 22, 64 * 7])
@pytest.mark.parametrize("case", LFQ)
def test_lfq(case, chunk, train, monkeypatch):
    kwargs, shape = LFQ[case]
    monkeypatch.setattr("vqfast.compat.vector_quantize_pytorch._plain.CHUNK_SCORES", chunk)
    peer, ours = pair("LFQ", **kwargs)
    assert_same(peer, ours, shape, train=train, steps=3, return_loss_breakdown=True, inv_temperature=3.0)
    ours.eval()
    out, indices, _ = ours(torch.randn(shape))
    torch.testing.assert_close(ours.indices_to_codes(indices), out)
    torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices))


@TRAIN
def test_lfq_counts_valid_rows_only(train):
    """The other library takes the mean over rows after it has lost the axis of rows, when there is a mask."""
    _, ours = pair("LFQ", dim=6, commitment_loss_weight=0.5)
    ours.train(train)
    x, mask = torch.randn(2, 50, 6), torch.arange(50).expand(2, 50) < 30
    masked = ours(x, mask=mask, return_loss_breakdown=True, inv_temperature=3.0)
    short = ours(x[:, :30], return_loss_breakdown=True, inv_temperature=3.0)
    for a, b in zip(tensors(masked)[2:], tensors(short)[2:], strict=True):
        assert_equal(a, b, "loss")
    assert ours(x, mask=torch.zeros_like(mask)).entropy_aux_loss == 0


RESIDUAL_LFQ = {
    "default": {"dim": 6, "codebook_size": 64, "num_quantizers": 3},
    "projection": {"dim": 10, "codebook_size": 64, "num_quantizers": 3},
    "soft clamp": {"dim": 6, "codebook_size": 64, "num_quantizers": 3, "soft_clamp_input_value": 4.0},
    "dropout": {"dim": 6, "codebook_size": 64, "num_quantizers": 4, "quantize_dropout": True},
}


@TRAIN
@pytest.mark.parametrize("case", RESIDUAL_LFQ)
def test_residual_lfq(case, train):
    kwargs = RESIDUAL_LFQ[case]
    peer, ours = pair("ResidualLFQ", **kwargs)
    assert_same(peer, ours, (2, 40, kwargs["dim"]), train=train, steps=3, return_all_codes=True)
    out, indices, _ = ours.eval()(torch.randn(2, 40, kwargs["dim"]))
    torch.testing.assert_close(ours.get_output_from_indices(indices), out)


def test_grouped_residual_lfq():
    peer, ours = pair("GroupedResidualLFQ", dim=12, groups=2, codebook_size=64, num_quantizers=3)
    assert_same(peer, ours, (2, 30, 12), steps=3, return_all_codes=True)


LATENT = {
    "default": ({"levels": [5, 5, 7], "dim": 3}, (2, 3, 20)),
    "even": ({"levels": [4, 6], "dim": 2}, (2, 2, 20)),
    "one number": ({"levels": 5, "codebook_dim": 4, "dim": 8}, (2, 8, 5, 6)),
    "weights": ({"levels": [5, 5], "dim": 2, "commitment_loss_weight": 0.7, "quantization_loss_weight": 0.2}, (2, 2, 20)),
    "fixed": ({"levels": [5, 5], "dim": 2, "optimize_values": False}, (2, 2, 20)),
    "codebooks": ({"levels": [5, 5], "dim": 4, "num_codebooks": 2}, (2, 4, 20)),
}


@TRAIN
@pytest.mark.parametrize("case", LATENT)
def test_latent_quantize(case, train):
    kwargs, shape = LATENT[case]
    peer, ours = pair("LatentQuantize", **kwargs)
    peer.train(train), ours.train(train)
    x = torch.rand(shape) - 0.5
    (out, indices, loss), (peer_out, peer_indices, peer_loss) = ours(x), peer(x)
    assert_equal(out, peer_out, "out")
    assert_equal(loss, peer_loss, "loss")
    assert indices.dtype == peer_indices.dtype and indices.shape == peer_indices.shape
    # The other library cuts off what rounding left of an index instead of rounding it.
    if not ours.has_projections:
        torch.testing.assert_close(ours.indices_to_codes(indices), out)


def test_latent_values_learn_in_place():
    _, face = libraries()
    layer = face.LatentQuantize([3], dim=1, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.25))
    x = torch.full((1, 1, 8), 0.4)
    before = layer.values_per_latent[0].detach().clone()
    layer(x)
    after = layer.values_per_latent[0].detach()
    assert torch.equal(before[:2], after[:2]) and abs(after[2] - 0.4) < abs(before[2] - 0.4)


@TRAIN
@pytest.mark.parametrize("act", ["tanh", "sigmoid", "normal", "laplace", "cauchy"])
@pytest.mark.parametrize("kwargs", [{}, {"need_inv_act": True}, {"quantize_rate": 0.5}, {"dim": 7}, {"channel_first": True}], ids=str)
def test_fsp(act, kwargs, train):
    peer, ours = pair("FSP", levels=[8, 5, 5], act_name=act, vector_norm="kurt", **kwargs)
    shape = (2, 3, 20) if kwargs.get("channel_first") else (2, 50, kwargs.get("dim", 3))
    assert_same(peer, ours, shape, train=train, steps=3)
    ours.eval()
    out, indices, _, facts = ours(torch.randn(shape))
    torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices))
    if not kwargs.get("need_inv_act"):
        torch.testing.assert_close(ours.indices_to_codes(indices), out)
    assert torch.equal(ours.indices_to_level_indices(indices).float(), facts["level_indices"])


@pytest.mark.parametrize("name", ["none", "var", "kurt", "var_tanh", "var_sigmoid", "var_laplace"])
def test_vector_norms(name):
    peer, face = libraries()
    x = torch.randn(100, 4) * 2 + 1
    peer_module, our_module = peer.finite_scalar_perturbation, face.finite_scalar_perturbation
    theirs, ours = peer_module.VectorNorm.build(name)(x), our_module.VectorNorm.build(name)(x)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert_equal(a, b, name)


@TRAIN
@pytest.mark.parametrize("kwargs", [{}, {"deterministic_on_eval": True}, {"kl_loss_threshold": 0.1}], ids=str)
def test_binary_mapper(kwargs, train):
    peer, ours = pair("BinaryMapper", bits=5, **kwargs)
    assert_same(peer, ours, (3, 4, 5), train=train, steps=3, return_indices=True, reduce_aux_kl_loss=False)
    assert_same(peer, ours, (7, 5), train=train, steps=2, temperature=0.5)
    logits = torch.randn(3, 4, 5)
    one_hot, indices, _ = ours(logits, return_indices=True)
    for call in ({"indices": indices}, {"one_hot": one_hot}, {"indices": indices, "sum_bits": False}):
        assert_equal(ours.log_prob(logits, **call), peer.log_prob(logits, **call), str(call))


@TRAIN
def test_evo_lfq(train):
    kwargs = {"encoder": Fresh(lambda: nn.Linear(10, 6)), "decoder": Fresh(lambda: nn.Linear(6, 10)), "dim": 6}
    peer, ours = pair("EvoLFQ", **kwargs, pop_size=8)
    assert_same(peer, ours, (5, 10), train=train, steps=2)
    assert_same(peer, ours, (5, 7, 10), train=train, steps=2)
    x = torch.randn(5, 10)
    for signs in (False, True):
        bits = ours.encode(x, return_signs=signs)
        assert_equal(bits, peer.encode(x, return_signs=signs), "bits")
        assert_equal(ours.decode_bits(bits), peer.decode_bits(bits), "decoded")
    populations = []
    for layer in (peer, ours):
        torch.manual_seed(3)
        start = layer.init_population_from_data(x)
        *_, last = layer.evolve(lambda decoded, bits: bits.sum(-1), pop_bits=start, generations=5, mutation_rate=0.1)
        populations.append((start, last.pop_bits))
    for theirs, own in zip(*populations, strict=True):
        assert torch.equal(theirs, own)


def test_evo_lfq_keeps_the_fittest():
    _, face = libraries()
    torch.manual_seed(0)
    layer = face.EvoLFQ(nn.Identity(), nn.Identity(), dim=12, pop_size=32)
    fitness = lambda decoded, bits: bits.sum(-1)  # noqa: E731
    results = list(layer.evolve(fitness, shape=(12,), generations=40, return_best_decoded=True))
    for result in results:
        assert result.best_gene.sum() == result.best_fitness
        assert torch.equal(result.best_decoded, result.best_gene * 2 - 1)
    assert results[-1].best_fitness >= 11 > results[0].best_fitness


# With fewer rows than codes, a k-means start leaves rests of rounding noise, and other rows replace dead codes.
FIRM = {"kmeans_init": False, "threshold_ema_dead_code": 0}
HIERARCHICAL = {
    "sequence": ({"scales": (1, 2, 4, 8)}, (2, 8, 16)),
    "not shared": ({"scales": (1, 4), "shared_codebook": False, "codebook_size": (4, 6)}, (4, 8, 16)),
    "channels last": ({"scales": (1, 2, 4), "channel_first": False}, (2, 16, 8)),
    "image": ({"scales": (1, 2, (3, 4)), "accept_image_fmap": True}, (3, 8, 6, 5)),
    "volume": ({"scales": (1, 2), "accept_3d_fmap": True}, (3, 8, 2, 3, 4)),
    "convolutions": ({"scales": (1, 2, 4, 8), "share_quant_resi": 2}, (2, 8, 16)),
    "no convolution": ({"scales": (1, 2, 4), "quant_resi": 0.0, "share_quant_resi": 0}, (2, 8, 16)),
    "dropout": ({"scales": (1, 2, 4), "nested_dropout": 0.7}, (2, 8, 16)),
}


@TRAIN
@pytest.mark.parametrize("case", HIERARCHICAL)
def test_hierarchical_vq(case, train):
    kwargs, shape = HIERARCHICAL[case]
    peer, ours = pair("HierarchicalVQ", **{"dim": 8, "codebook_size": 16, **FIRM, **kwargs})
    assert_same(peer, ours, shape, train=train, steps=5)
    ours.eval()
    x = torch.randn(shape)
    out, indices, _ = ours(x)
    full = shape[1:-1] if kwargs.get("channel_first") is False else shape[2:]
    torch.testing.assert_close(ours.get_output_from_indices(indices, full), out)
    torch.testing.assert_close(ours.get_output_from_indices(indices, full), peer.get_output_from_indices(indices, full))


@TRAIN
@pytest.mark.parametrize("call", [{"lens": torch.tensor([5, 16])}, {"mask": torch.arange(32).view(2, 16) % 5 > 0}], ids=["lens", "mask"])
def test_hierarchical_vq_masks(call, train):
    peer, ours = pair("HierarchicalVQ", dim=8, codebook_size=16, scales=(1, 2, 4, 16), **FIRM)
    assert_same(peer, ours, (2, 8, 16), train=train, steps=5, **call)


def test_sequential():
    peer, face = libraries()
    layers = []
    for library in (peer, face):
        torch.manual_seed(0)
        layers.append(library.Sequential(nn.Linear(6, 4), library.VectorQuantize(4, 16), nn.Linear(4, 6)))
    assert_same(*layers, (2, 20, 6), steps=5, freeze_codebook=False)
    with pytest.raises(AssertionError):
        face.Sequential(nn.Linear(6, 4))


def test_public_names_are_the_other_library_s():
    peer, face = libraries()
    names = {name for name in dir(peer) if name[0].isupper()}
    assert names == set(face.__all__)
    for module in ("residual_vq", "sim_vq", "lookup_free_quantization", "vector_quantize_pytorch", "utils"):
        assert hasattr(face, module) and hasattr(peer, module)


# Defaults that say the same in another way, or where the other library's default undoes the constructor's (freeze_codebook).
OTHER_DEFAULTS = {"straight_through_activation", "mlp_kwargs", "init_fn", "freeze_codebook"}
SMALL = {
    "VectorQuantize": {"dim": 8, "codebook_size": 16},
    "ResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
    "GroupedResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
    "SimVQ": {"dim": 8, "codebook_size": 16},
    "ResidualSimVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
    "RandomProjectionQuantizer": {"dim": 8, "codebook_size": 16, "codebook_dim": 4},
    "FSQ": {"levels": [5, 5]},
    "FSP": {"levels": [5, 5]},
    "LFQ": {"dim": 4},
    "EvoLFQ": {"dim": 4, "encoder": nn.Identity(), "decoder": nn.Identity()},
    "ResidualFSQ": {"levels": [5, 5], "num_quantizers": 2},
    "GroupedResidualFSQ": {"dim": 4, "groups": 2, "levels": [5, 5], "num_quantizers": 2},
    "ResidualLFQ": {"dim": 4, "codebook_size": 16, "num_quantizers": 2},
    "GroupedResidualLFQ": {"dim": 8, "groups": 2, "codebook_size": 16, "num_quantizers": 2},
    "LatentQuantize": {"levels": [5, 5], "dim": 2},
    "BinaryMapper": {"bits": 3},
    "HierarchicalVQ": {"dim": 8, "codebook_size": 16, "scales": (1, 2)},
}
# Steps of the other library's own forward, in einops' terms.
PRIVATE_IN_SPIRIT = {"LatentQuantize": {"quantize_and_project"}, "HierarchicalVQ": {"flatten", "unflatten", "to", "mask", "indices"}}


@pytest.mark.parametrize("name", SMALL)
def test_signatures_and_attributes(name):
    peer, face = (getattr(library, name) for library in libraries())
    for method in ("__init__", "forward"):
        theirs, own = (inspect.signature(getattr(c, method)).parameters for c in (peer, face))
        assert list(theirs) == list(own)
        for key, parameter in theirs.items():
            assert own[key].kind == parameter.kind
            assert own[key].default == parameter.default or key in OTHER_DEFAULTS, key
    made = [c(**SMALL[name]) for c in (peer, face)]
    missing = {a for a in dir(made[0]) if not a.startswith("_") and not hasattr(made[1], a)}
    private = PRIVATE_IN_SPIRIT.get(name, set())
    assert {a for a in missing if a not in private and a.split("_")[0] not in private} == set()

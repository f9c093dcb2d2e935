"""vqfast.compat.vector_quantize_pytorch.VectorQuantize beside the library whose face it is."""

import oracle
import pytest
import torch
from side_by_side import Fresh, assert_equal, assert_same, libraries, pair
from torch import nn

BASE = {"dim": 16, "codebook_size": 32}
TOKENS = (2, 64, 16)
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
SEPARATE = {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True}
SHARED = {"heads": 2, "codebook_dim": 8}

LAYERS = {
    "default": ({}, TOKENS),
    "straight-through": ({"rotation_trick": False}, TOKENS),
    "cosine": ({"use_cosine_sim": True}, TOKENS),
    "projection": ({"codebook_dim": 8}, TOKENS),
    "heads": (SHARED, TOKENS),
    "heads, separate": (SEPARATE, TOKENS),
    "heads, separate, cosine": ({**SEPARATE, "use_cosine_sim": True}, TOKENS),
    "channels first": ({"channel_last": False}, (2, 16, 20)),
    "image": ({"accept_image_fmap": True}, (2, 16, 5, 7)),
    "volume": ({"accept_3d_fmap": True}, (2, 16, 3, 5, 7)),
    "image, heads": ({**SEPARATE, "accept_image_fmap": True}, (2, 16, 5, 7)),
    "one token": ({}, (40, 16)),
    "learnable": (LEARNABLE, TOKENS),
    "learnable, straight-through": ({**LEARNABLE, "rotation_trick": False}, TOKENS),
    "learnable, synchronous": ({**LEARNABLE, "sync_update_v": 0.3}, TOKENS),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, TOKENS),
    "orthogonal, active, at most 8": (
        {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True, "orthogonal_reg_max_codes": 8},
        TOKENS,
    ),
    "stochastic": ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.5}, TOKENS),
    "dead codes": ({"threshold_ema_dead_code": 2}, TOKENS),
    "dead codes, heads": ({**SEPARATE, "threshold_ema_dead_code": 2}, TOKENS),
    "dead codes, heads of a volume": ({**SHARED, "threshold_ema_dead_code": 2, "accept_3d_fmap": True}, (2, 16, 3, 5, 7)),
    "stochastic, heads": ({**SHARED, "stochastic_sample_codes": True, "sample_codebook_temp": 0.5}, TOKENS),
    "k-means, heads": ({**SHARED, "kmeans_init": True}, TOKENS),
    "directional, heads of an image": (
        {**SHARED, "directional_reparam": True, "threshold_ema_dead_code": 2, "accept_image_fmap": True},
        (2, 16, 5, 7),
    ),
    "directional, separate heads": ({**SEPARATE, "directional_reparam": True, "threshold_ema_dead_code": 2}, TOKENS),
    "k-means": ({"kmeans_init": True}, TOKENS),
    "k-means, cosine, dead codes": ({"kmeans_init": True, "use_cosine_sim": True, "threshold_ema_dead_code": 2}, TOKENS),
    "directional": ({"directional_reparam": True, "threshold_ema_dead_code": 2}, TOKENS),
    "bridge": ({"vq_bridge": Fresh(lambda: nn.Linear(16, 16))}, TOKENS),
    "manual averages": ({"manual_ema_update": True}, TOKENS),
    "no averages": ({"ema_update": False}, TOKENS),
    "frozen": ({"freeze_codebook": True}, TOKENS),
    "in-place optimizer": (
        {**LEARNABLE, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
        TOKENS,
    ),
    "no commitment": ({"commitment_weight": 0.0}, TOKENS),
    "no gradient to the input": ({"route_gradients_to_input": False}, TOKENS),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_does_what_the_other_library_does(case, train):
    kwargs, shape = LAYERS[case]
    assert_same(*pair("VectorQuantize", **BASE | kwargs), shape, train=train, steps=20 if train else 2)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("case", ["default", "cosine", "learnable"])
def test_other_seeds_and_precisions(case, seed):
    kwargs, shape = LAYERS[case]
    assert_same(*pair("VectorQuantize", seed, **BASE | kwargs), shape, steps=5)
    if case != "cosine":  # the other library normalises in x's precision, and then searches for what it rounded
        # one step: gradients in half precision part the two libraries' learnable codes
        for dtype in (torch.bfloat16, torch.float16):
            assert_same(*pair("VectorQuantize", seed, **BASE | kwargs), shape, steps=1, dtype=dtype)
    assert_same(*pair("VectorQuantize", seed, **BASE | kwargs), shape, steps=3, dtype=torch.float64)


CALLS = {
    "breakdown": {"return_loss_breakdown": True},
    "k nearest": {"topk": 3},
    "mask": {"mask": torch.arange(128).view(2, 64) % 3 > 0},
    "lens": {"lens": torch.tensor([10, 50])},
    "k nearest, mask": {"topk": 3, "mask": torch.arange(128).view(2, 64) % 3 > 0},
    "frozen": {"freeze_codebook": True},
    "no averages": {"ema_update": False},
    "weights": {"ema_update_weight": torch.linspace(0, 1, 32)},
    "weight function": {"ema_update_weight": lambda sums, counts: (counts > 2).float()},
    "accumulated": {"accum_ema_update": True},
    "targets": {"indices": torch.arange(128).view(2, 64) % 32, "freeze_codebook": True},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CALLS)
def test_a_call_does_what_the_other_library_does(case, train):
    assert_same(*pair("VectorQuantize", **BASE), TOKENS, train=train, steps=10 if train else 2, **CALLS[case])


def test_masked_rows_replace_no_code():
    """Rows are drawn from the valid ones, the same as in the other library."""
    peer, ours = pair("VectorQuantize", **BASE, threshold_ema_dead_code=2)
    assert_same(peer, ours, TOKENS, steps=10, **CALLS["mask"])


@pytest.mark.parametrize("kwargs, shape", [({"channel_last": False}, (2, 16, 20)), ({"accept_image_fmap": True}, (2, 16, 5, 7))])
def test_the_k_nearest_in_other_layouts(kwargs, shape):
    assert_same(*pair("VectorQuantize", **BASE | kwargs), shape, steps=2, topk=2)


SOFT = {
    "diversity": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0},
    "diversity, heads": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0, **SHARED},
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "cross entropy, heads": {"commitment_use_cross_entropy_loss": True, **SHARED},
    "gumbel": {
        "stochastic_sample_codes": True,
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
    },
    "gumbel, nearest code": {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False},
}


@pytest.mark.parametrize("chunk", [1 << 22, 32 * 7, 32])
@pytest.mark.parametrize("case", SOFT)
def test_soft_assignments_in_chunks(case, chunk, monkeypatch):
    libraries()
    monkeypatch.setattr("vqfast.compat.vector_quantize_pytorch._plain.CHUNK_SCORES", chunk)
    # Frozen: the other library takes this gradient at the codebook as its forward has moved it.
    assert_same(*pair("VectorQuantize", **BASE | SOFT[case]), TOKENS, steps=3, freeze_codebook=True)
    # Unfrozen the values still agree.
    peer, ours = pair("VectorQuantize", **BASE | SOFT[case])
    assert_same(peer, ours, TOKENS, steps=3, gradients=False)


@pytest.mark.parametrize("case", ["gumbel", "gumbel, nearest code"])
def test_soft_assignments_among_codes_that_learn(case):
    """The gradient of the codes is that of the chosen ones and of the logits. Frozen for the reason above."""
    peer, ours = pair("VectorQuantize", **BASE | SOFT[case], orthogonal_reg_weight=0.5)
    assert_same(peer, ours, TOKENS, steps=3, freeze_codebook=True)


@pytest.mark.parametrize("case", ["diversity", "cross entropy", "cross entropy, heads", "targets"])
def test_losses_of_codes_that_a_function_makes(case):
    """codebook_transform_fn= with the terms that compare with every code."""
    kwargs = {"commitment_weight": 1.0} if case == "targets" else SOFT[case]
    call = {"indices": CALLS["targets"]["indices"][:, :6]} if case == "targets" else {}
    batch = 4 if "heads" in case else 2
    shift = torch.linspace(0, 1, batch * 6).reshape(1, batch, 6, 1, 1)
    peer, ours = pair("VectorQuantize", **BASE | kwargs)
    options = {"codebook_transform_fn": lambda codes: codes[:, None, None] * (1 + shift), "freeze_codebook": True, **call}
    assert_same(peer, ours, (2, 6, 16), steps=2, **options)


def test_diversity_of_single_tokens():
    assert_same(*pair("VectorQuantize", **BASE | SOFT["diversity"]), (40, 16), steps=3, freeze_codebook=True)


def test_affine_codebooks_in_training():
    peer, ours = pair("VectorQuantize", **BASE, affine_param=True)
    assert_same(peer, ours, TOKENS)
    fresh = pair("VectorQuantize", **BASE, affine_param=True)[1]
    fresh.load_state_dict(peer.state_dict(), strict=True)  # with batch_mean and batch_variance, which a fresh layer lacks
    x = torch.randn(TOKENS)
    fresh.eval()
    ours.eval()
    assert torch.equal(fresh(x)[1], ours(x)[1])
    assert torch.allclose(ours(x)[0], ours.get_output_from_indices(ours(x)[1]))


def test_accumulated_statistics_are_those_of_one_batch():
    _, ours = pair("VectorQuantize", **BASE)
    _, whole = pair("VectorQuantize", **BASE)
    x = torch.randn(4, 32, 16)
    ours(x[:2], accum_ema_update=True)
    assert torch.equal(ours.codebook, whole.codebook)
    ours(x[2:])
    whole(x)
    torch.testing.assert_close(ours.codebook, whole.codebook)


@pytest.mark.parametrize("metric, kwargs", [("l2", {}), ("dot", {"use_cosine_sim": True})])
def test_codes_are_those_of_float64(metric, kwargs):
    peer, ours = pair("VectorQuantize", dim=16, codebook_size=500, **kwargs)
    peer.eval(), ours.eval()
    x = torch.randn(1, 2000, 16) + 0.3
    rows = torch.nn.functional.normalize(x, dim=-1, eps=1e-6) if kwargs else x
    truth = oracle.nearest(rows, ours.codebook, metric).indices
    assert torch.equal(ours(x)[1], truth)
    assert (peer(x)[1] != truth).sum() <= 20  # near ties that float32 scores settle otherwise


def test_close_codes_are_told_apart():
    """The other library clamps squared distances at 1e-8, so all codes nearer than 1e-4 tie, and the first wins."""
    peer, ours = pair("VectorQuantize", dim=2, codebook_size=4)
    codes = torch.tensor([[0.0, 0.0], [1e-5, 0.0], [2e-5, 0.0], [1.0, 0.0]])
    peer.codebook = codes
    ours.codebook = codes
    peer.eval(), ours.eval()
    x = torch.tensor([[[1.1e-5, 0.0]]])
    assert peer(x)[1].item() == 0
    assert ours(x)[1].item() == 1


def test_the_rotation_trick_at_zero_and_backwards():
    _, face = libraries()
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]], requires_grad=True)
    q = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [1.0, 3.0]])
    out = face.vector_quantize_pytorch.rotate_to(x, q)
    assert torch.equal(out, q)
    g = torch.tensor([1.0, -2.0])
    out[2].backward(g)
    u, v = x.detach()[2] / 5**0.5, q[2] / 10**0.5
    w = (u + v) / (u + v).norm()
    matrix = 2**0.5 * (torch.eye(2) - 2 * w[:, None] * w + 2 * v[:, None] * u)
    torch.testing.assert_close(matrix @ x.detach()[2], q[2])
    torch.testing.assert_close(x.grad[2], matrix.T @ g)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rotation_trick_where_channels_come_first(dtype):
    _, face = libraries()
    x, q, g = (torch.randn(2, 7, 12).to(dtype).transpose(1, 2) for _ in range(3))
    x[0, 3] = 0.0
    gradients = []
    for lay in (lambda t: t, torch.Tensor.contiguous):
        leaf = lay(x).detach().requires_grad_()
        face.vector_quantize_pytorch.rotate_to(leaf, lay(q)).backward(lay(g))
        gradients.append(leaf.grad)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    for first, rows in zip(*(t.flatten(0, 1) for t in gradients), strict=True):  # the zero row's is a million times as long
        torch.testing.assert_close(first, rows, rtol=0, atol=16 * unit * rows.abs().max().item())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", ["default", "cosine", "heads", "heads, separate"])
def test_the_inner_codebook_is_a_seam_that_others_call(case, train):
    peer, ours = pair("VectorQuantize", **BASE | LAYERS[case][0])
    x = torch.randn(2, 30, 16)
    for layer in (peer, ours):
        layer.train(train)
    inputs = [layer._codebook.transform_input(layer.maybe_split_heads_from_input(x)) for layer in (peer, ours)]
    assert torch.equal(*inputs)
    results = [layer._codebook(given) for layer, given in zip((peer, ours), inputs, strict=True)]
    for theirs, own in zip(*results, strict=True):
        assert_equal(own, theirs, case)
    for name, value in peer.state_dict().items():
        assert_equal(ours.state_dict()[name], value, name)


def test_codes_can_be_read_set_and_stepped_by_hand():
    peer, ours = pair("VectorQuantize", **BASE, **LEARNABLE, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                      manual_in_place_optimizer_update=True)  # fmt: skip
    x, codes = torch.randn(2, 64, 16), torch.randn(32, 16)
    for layer in (peer, ours):
        with torch.no_grad():
            layer.codebook = codes
        layer(x)
        assert torch.equal(layer.codebook, codes)
        layer.update_in_place_optimizer()
        assert not torch.equal(layer.codebook, codes)
    torch.testing.assert_close(ours.codebook, peer.codebook)
    assert ours.ema_update is peer.ema_update is False


def test_dead_codes_can_be_replaced_by_hand():
    peer, ours = pair("VectorQuantize", **BASE, threshold_ema_dead_code=2)
    x = torch.randn(1, 64, 16)  # of a larger batch the other library sees the first element only
    for layer in (peer, ours):
        torch.manual_seed(3)
        layer.expire_codes_(x)
        assert all((x[0] == code).all(-1).any() for code in layer.codebook)
    assert torch.equal(ours.codebook, peer.codebook)

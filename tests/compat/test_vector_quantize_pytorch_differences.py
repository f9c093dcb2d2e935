"""Where vqfast.compat.vector_quantize_pytorch differs from the other library on purpose; docs/COMPAT.md lists these."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from side_by_side import libraries, pair
from torch import nn

BASE = {"dim": 16, "codebook_size": 32}
MASK = torch.arange(128).view(2, 64) % 3 > 0
HEADS = {
    "projection": {"codebook_dim": 8},
    "heads": {"heads": 2, "codebook_dim": 8},
    "separate heads": {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
    "projected heads": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
    "cosine": {"use_cosine_sim": True},
    "cross entropy, heads": {"heads": 2, "codebook_dim": 8, "commitment_use_cross_entropy_loss": True},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parts(layer, x, **kwargs):
    """One training forward and backward: outputs, x's gradient, the codebook after it."""
    x = x.clone().requires_grad_()
    quantized, indices, loss = layer(x, **kwargs)
    (quantized.sum() + loss.sum()).backward()
    return quantized.detach(), indices, loss.detach(), x.grad, layer._codebook.embed.detach().clone()


@pytest.mark.parametrize("case", HEADS)
def test_masks_work_with_projections_and_heads(case):
    """A masked batch does what a batch of its valid rows alone does, whatever stands at masked positions."""
    _, ours = pair("VectorQuantize", **BASE | HEADS[case])
    _, alone = pair("VectorQuantize", **BASE | HEADS[case])
    x = torch.randn(2, 64, 16)
    spoiled = torch.where(MASK[..., None], x, torch.nan)
    quantized, indices, loss, grad, codes = parts(ours, torch.nan_to_num(spoiled, 1e4), mask=MASK)
    q, i, l, g, c = parts(alone, x[MASK][None])
    torch.testing.assert_close(quantized[MASK], q[0])
    assert torch.equal(indices[MASK], i[0])
    torch.testing.assert_close(loss, l)
    torch.testing.assert_close(grad[MASK], g[0])
    torch.testing.assert_close(codes, c)
    assert (quantized[~MASK] == 0).all() and (indices[~MASK] == -1).all() and (grad[~MASK] == 0).all()


@pytest.mark.parametrize("kwargs", [{}, {"codebook_dim": 8}, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}], ids=str)
@pytest.mark.parametrize("empty", [True, False], ids=["no rows", "all masked"])
def test_without_a_valid_row_nothing_changes(kwargs, empty):
    _, ours = pair("VectorQuantize", **BASE | kwargs)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(2, 0 if empty else 64, 16)
    quantized, indices, loss, grad, _ = parts(ours, x, mask=torch.zeros(x.shape[:2], dtype=torch.bool))
    assert loss == 0 and not grad.any() and not quantized.any() and (indices == -1).all()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kwargs", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}, {"kmeans_init": True}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(value, kwargs):
    _, ours = pair("VectorQuantize", **BASE | kwargs)
    x = torch.randn(2, 64, 16)
    x[1, 5, 3] = value
    for _ in range(3):
        quantized, indices, loss = ours(x)
    assert loss.isfinite() and quantized[0].isfinite().all() and indices[1, 5] == 0
    assert all(value.isfinite().all() for value in ours.state_dict().values())


LEARNABLE = {"learnable_codebook": True, "ema_update": False}
LEVELS = {"num_quantizers": 2}
APART = {  # layers, and a call's arguments, that compare, learn or differentiate where the search leaves a row out
    "default": ("VectorQuantize", {}, {}),
    "learnable": ("VectorQuantize", LEARNABLE, {}),
    "learnable, synchronous": ("VectorQuantize", LEARNABLE | {"sync_update_v": 0.3}, {}),
    "learnable, separate heads": ("VectorQuantize", LEARNABLE | HEADS["separate heads"], {}),
    "learnable, image": ("VectorQuantize", LEARNABLE | {"accept_image_fmap": True}, {}),
    "orthogonal": ("VectorQuantize", {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}, {}),
    "in-place": ("VectorQuantize", LEARNABLE | {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, {}),
    "directional": ("VectorQuantize", {"directional_reparam": True, "threshold_ema_dead_code": 2}, {}),
    "stochastic": ("VectorQuantize", {"stochastic_sample_codes": True, "threshold_ema_dead_code": 2}, {}),
    "gumbel": ("VectorQuantize", {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False}, {}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}, {}),
    "cross entropy, heads": ("VectorQuantize", HEADS["cross entropy, heads"], {}),
    "projection": ("VectorQuantize", {"codebook_dim": 8, "layernorm_after_project_in": True, "kmeans_init": True}, {}),
    "projected heads": ("VectorQuantize", HEADS["projected heads"], {}),
    "k nearest": ("VectorQuantize", {}, {"topk": 3}),
    "own codes": ("VectorQuantize", {}, {"codebook_transform_fn": lambda codes: codes[:, None, None].repeat(1, 2, 12, 1, 1)}),
    "residual": ("ResidualVQ", LEVELS | LEARNABLE, {}),
    "residual, projection": ("ResidualVQ", LEVELS | {"codebook_dim": 8}, {}),
    "residual, directional": ("ResidualVQ", LEVELS | {"diveq": True, "threshold_ema_dead_code": 2, "codebook_dim": 8}, {}),
    "shared": ("ResidualVQ", LEVELS | {"shared_codebook": True, "threshold_ema_dead_code": 2, "codebook_dim": 8}, {}),
    "implicit": ("ResidualVQ", LEVELS | {"implicit_neural_codebook": True}, {}),
    "beams": ("ResidualVQ", LEVELS | {"beam_size": 2}, {}),
    "beams, projection": ("ResidualVQ", LEVELS | {"beam_size": 2, "commitment_weight": 0.0, "codebook_dim": 8}, {}),
    "grouped": ("GroupedResidualVQ", LEVELS | LEARNABLE | {"groups": 2}, {}),
}


def two_steps(layer, x, mask, count, call):
    """Results with channels last, x's gradient, parameters' gradients, state; the objective takes the positions that count."""
    x, image = x.clone().requires_grad_(), getattr(layer, "accept_image_fmap", False)
    for _ in range(2):
        torch.manual_seed(3)
        given, valid = x, mask
        if image:
            given, valid = x.unflatten(1, (3, 4)).movedim(-1, 1), None if mask is None else mask.unflatten(1, (3, 4))
        quantized, indices, loss = layer(given, mask=valid, **call)
        quantized, indices = (quantized.movedim(1, -1).flatten(1, 2), indices.flatten(1, 2)) if image else (quantized, indices)
        x.grad = None
        layer.zero_grad()
        objective = quantized[count].square().sum() + loss.sum()
        if objective.requires_grad:
            objective.backward()
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    indices = indices.movedim(0, -1) if hasattr(layer, "rvqs") else indices
    parameters = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return quantized.detach(), indices, grad, (loss.detach(), parameters, layer.state_dict())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", APART)
def test_a_row_that_is_not_finite_does_what_a_masked_one_does(case, train):
    """But for index 0 and a NaN output where no mask hides it; under a mask it is any other value."""
    name, kwargs, call = APART[case]
    alone, hidden, masked = (pair(name, **BASE | kwargs)[1].train(train) for _ in range(3))
    x, bad = torch.randn(2, 12, 16), torch.zeros(2, 12, dtype=torch.bool)
    bad[0, 5] = bad[1, 0] = True
    spoiled = x.clone()
    spoiled[0, 5, ::8], spoiled[1, 0, 7::8] = torch.nan, -torch.inf  # in every head and group
    quantized, indices, grad, rest = two_steps(masked, x, ~bad, ~bad, call)
    q, i, g, r = two_steps(alone, spoiled, None, ~bad, call)
    assert q[bad].isnan().all() and (i[bad] == 0).all() and not g[bad].any()
    torch.testing.assert_close((q[~bad], i[~bad], g[~bad], r), (quantized[~bad], indices[~bad], grad[~bad], rest))
    result = two_steps(hidden, spoiled, ~bad, ~bad, call)
    torch.testing.assert_close(result, (quantized, indices, grad, rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["learnable", "cross entropy, heads", "k nearest", "residual", "beams"])
def test_a_row_that_is_not_finite_stays_alone_in_every_precision(case, dtype):
    name, kwargs, call = APART[case]
    _, ours = pair(name, **BASE | kwargs)
    x = torch.randn(2, 12, 16).to(dtype)
    x[0, 5] = torch.nan
    x.requires_grad_()
    quantized, indices, loss = ours(x, **call)
    (quantized[1].sum() + loss.sum()).backward()
    assert quantized[0, 5].isnan().all() and not indices[0, 5].any() and quantized.dtype == dtype
    assert quantized[1].isfinite().all() and loss.isfinite().all() and x.grad.isfinite().all() and not x.grad[0, 5].any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("function", [False, True], ids=["codes", "codes of a function"])
@pytest.mark.parametrize("kwargs", [{}, HEADS["heads"], HEADS["separate heads"], HEADS["projection"]], ids=str)
def test_diversity_is_that_of_finite_rows(kwargs, function):
    """Masked or not: as in the other library a masked row counts here, if it is finite."""
    _, ours = pair("VectorQuantize", **BASE | kwargs, codebook_diversity_loss_weight=1.0, codebook_diversity_temperature=3.0)
    shared = 1 if "separate_codebook_per_head" in kwargs else kwargs.get("heads", 1)  # heads that are more batch

    def spread(batch, positions):
        """As the argument of the call: the codes themselves for every row."""
        return lambda codes: codes[:, None, None].expand(-1, batch * shared, positions, -1, -1)

    call = {"freeze_codebook": True, "return_loss_breakdown": True}
    x, finite = torch.randn(5, 3, 16), torch.arange(15).view(5, 3) % 4 > 0
    finite[:, 1] = False  # a position without any row
    expected = []
    for position in (0, 2):
        rows = x[finite[:, position], position][:, None]
        call["codebook_transform_fn"] = spread(len(rows), 1) if function else None
        expected.append(ours(rows, **call)[3].codebook_diversity)
    spoiled = torch.where(finite[..., None], x, torch.nan)
    call["codebook_transform_fn"] = spread(5, 3) if function else None
    for mask in (None, finite, finite & (torch.arange(3) > 1)):
        given = spoiled.clone().requires_grad_()
        _, indices, loss, breakdown = ours(given, mask=mask, **call)
        torch.testing.assert_close(breakdown.codebook_diversity, sum(expected) / 2)
        loss.backward()
        assert given.grad[finite].any() and given.grad.isfinite().all() and not given.grad[~finite].any()
        assert (indices[~finite] == 0).all() if mask is None else (indices[~mask] == -1).all()


@pytest.mark.parametrize("shape", [(2, 12, 16), (24, 16)], ids=["tokens", "single tokens"])
@pytest.mark.parametrize("name, kwargs", [("VectorQuantize", {}), ("ResidualVQ", LEVELS)])
def test_targets_of_rows_that_are_not_finite_do_not_count(name, kwargs, shape):
    _, ours = pair(name, **BASE | kwargs)
    x, targets = torch.randn(shape), torch.randint(0, 32, (*shape[:-1], *([2] if kwargs else [])))
    finite = torch.arange(24).view(shape[:-1]) % 5 > 0
    _, expected = ours(x[finite][None], indices=targets[finite][None], freeze_codebook=True)
    given = torch.where(finite[..., None], x, torch.inf).requires_grad_()
    quantized, entropy = ours(given, indices=targets, freeze_codebook=True)
    torch.testing.assert_close(entropy, expected)
    entropy.backward()
    assert quantized[~finite].isnan().all() and given.grad.isfinite().all() and not given.grad[~finite].any()


@pytest.mark.parametrize("case", ["learnable", "k nearest", "residual, projection"])
def test_rows_that_are_not_finite_in_one_compiled_graph(case):
    torch._dynamo.reset()
    name, kwargs, call = APART[case]
    x, count = torch.randn(2, 12, 16), torch.arange(24).view(2, 12) % 5 > 0
    spoiled = torch.where(count[..., None], x, torch.nan)
    eager, other = (pair(name, **BASE | kwargs)[1] for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    q, i, g, (l, *_) = two_steps(eager, spoiled, None, count, call)
    quantized, indices, grad, (loss, *_) = two_steps(compiled, spoiled, None, count, call)
    torch.testing.assert_close((quantized, indices, grad, loss), (q, i, g, l), equal_nan=True)
    assert quantized[~count].isnan().all() and not indices[~count].any() and grad.isfinite().all() and loss.isfinite().all()


def test_with_nothing_but_rows_that_are_not_finite_nothing_changes():
    _, ours = pair("VectorQuantize", **BASE, codebook_diversity_loss_weight=1.0, commitment_use_cross_entropy_loss=True)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    _, indices, loss, grad, _ = parts(ours, torch.full((2, 5, 16), torch.nan))
    assert loss == 0 and not grad.any() and not indices.any()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_one_row_that_is_not_finite_ends_the_other_library_s_codebook():
    peer, _ = pair("VectorQuantize", **BASE)
    x = torch.randn(2, 64, 16)
    x[0, 0, 0] = torch.nan
    peer(x)
    assert peer.codebook.isnan().any()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", [{}, {"codebook_dim": 8}, {"quantize_dropout": True}, {"beam_size": 2}], ids=str)
def test_feature_maps_in_residual_layers(kwargs, train):
    """The same as rows: the other library fails unless channels, height and width are equal."""
    _, image = pair("ResidualVQ", **BASE, num_quantizers=3, accept_image_fmap=True, **kwargs)
    _, rows = pair("ResidualVQ", **BASE, num_quantizers=3, **kwargs)
    image.train(train), rows.train(train)
    x = torch.randn(2, 16, 5, 7)
    quantized, indices, losses = image(x, freeze_codebook=True, rand_quantize_dropout_fixed_seed=1)
    q, i, l = rows(x.flatten(2).transpose(1, 2), freeze_codebook=True, rand_quantize_dropout_fixed_seed=1)
    torch.testing.assert_close(quantized, q.transpose(1, 2).reshape(2, 16, 5, 7))
    assert torch.equal(indices, i.reshape(2, 5, 7, 3))
    torch.testing.assert_close(losses, l)
    torch.testing.assert_close(image.get_output_from_indices(indices), quantized)


def test_feature_maps_in_grouped_layers():
    _, ours = pair("GroupedResidualVQ", **BASE, num_quantizers=3, groups=2, accept_image_fmap=True)
    x = torch.randn(2, 16, 5, 7)
    quantized, indices, _ = ours(x, freeze_codebook=True)
    assert quantized.shape == x.shape and indices.shape == (2, 2, 5, 7, 3)
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("kwargs", [{}, HEADS["heads"], HEADS["projected heads"]], ids=str)
@pytest.mark.parametrize("layout", [{}, {"channel_last": False}, {"accept_image_fmap": True}], ids=str)
def test_indices_decode_in_every_layout(layout, kwargs):
    """Heads that share a codebook, projections behind channels first, and masked positions: the other library fails."""
    _, ours = pair("VectorQuantize", **BASE | {"dim": 12} | kwargs | layout)
    ours.eval()
    x = torch.randn({0: (2, 5, 12), 1: (2, 12, 5)}[len(layout)] if "accept_image_fmap" not in layout else (2, 12, 5, 7))
    quantized, indices, _ = ours(x)
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    missing = ours.get_codes_from_indices(torch.full_like(indices, -1))
    assert not missing.any()


@pytest.mark.parametrize("layout, shape", [({"channel_last": False}, (2, 16, 40)), ({"accept_image_fmap": True}, (2, 16, 8, 5))])
def test_masks_in_other_layouts(layout, shape):
    """lens counts positions, not channels; feature maps take a mask of their own shape."""
    _, ours = pair("VectorQuantize", **BASE | layout)
    x = torch.randn(shape)
    mask = torch.arange(40).view(1, *shape[2:]).expand(2, *shape[2:]) < 30
    _, indices, _ = ours(x, mask=mask)
    assert torch.equal(indices >= 0, mask)
    if len(shape) == 3:
        assert torch.equal(ours(x, lens=torch.tensor([30, 30]))[1] >= 0, mask)


@pytest.mark.parametrize("targets", ["tensor", "list"])
def test_residual_cross_entropy(targets):
    """The other library unpacks two results into three names here."""
    peer, ours = pair("ResidualVQ", **BASE, num_quantizers=3)
    peer.eval(), ours.eval()
    x = torch.randn(2, 20, 16)
    quantized, indices, _ = ours(x)
    with pytest.raises(ValueError):
        peer(x, indices=indices)
    again, entropy = ours(x, indices=indices)
    torch.testing.assert_close(again, quantized)
    rest, expected = x, 0.0
    for level, codes in enumerate(ours.codebooks):
        expected = expected + nn.functional.cross_entropy(-torch.cdist(rest, codes).transpose(1, 2), indices[..., level])
        rest = rest - codes[indices[..., level]]
    torch.testing.assert_close(entropy, expected)
    assert ours(x, indices=(indices + 1) % 32)[1] > entropy
    with pytest.raises(AssertionError, match="every level"):
        ours(x, indices=torch.full_like(indices, -1))


def test_grouped_cross_entropy():
    _, ours = pair("GroupedResidualVQ", **BASE, num_quantizers=3, groups=2)
    ours.eval()
    x = torch.randn(2, 20, 16)
    _, indices, _ = ours(x)
    quantized, entropy = ours(x, indices=indices)
    assert quantized.shape == x.shape and entropy < ours(x, indices=(indices + 1) % 32)[1]


def test_gradients_of_soft_assignments_are_taken_where_the_forward_was():
    """The other library's averages overwrite the codebook between forward and backward."""
    peer, ours = pair("VectorQuantize", **BASE, commitment_use_cross_entropy_loss=True)
    x = torch.randn(2, 64, 16)
    grads = []
    for layer, freeze in ((peer, True), (peer, False), (ours, True), (ours, False)):
        given = x.clone().requires_grad_()
        layer(given, freeze_codebook=freeze)[2].backward()
        grads.append(given.grad)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-3, atol=1e-6)
    assert torch.equal(grads[2], grads[3])
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2)


def test_a_frozen_residual_layer_stays_frozen():
    peer, ours = pair("ResidualVQ", **BASE, num_quantizers=2, freeze_codebook=True)
    before = ours.codebooks.clone()
    ours(torch.randn(2, 64, 16))
    peer(torch.randn(2, 64, 16))
    assert torch.equal(ours.codebooks, before) and not torch.equal(peer.codebooks, before)
    _, shared = pair("ResidualVQ", **BASE, num_quantizers=2, shared_codebook=True, threshold_ema_dead_code=2)
    before = shared.codebooks.clone()
    shared(torch.randn(2, 64, 16), freeze_codebook=True)
    assert torch.equal(shared.codebooks, before)


def test_eval_changes_no_affine_statistics():
    _, ours = pair("VectorQuantize", **BASE, affine_param=True)
    ours(torch.randn(2, 64, 16))
    ours.eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours(torch.randn(2, 64, 16) * 3)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_replaced_codes_stand_where_the_affine_map_expects_them():
    # No whole number of rows takes a size of 1 to this threshold, so codes of this size have just been replaced.
    _, ours = pair("VectorQuantize", **BASE, affine_param=True, threshold_ema_dead_code=2.7)
    x = torch.randn(2, 64, 16) * 4 + 3
    ours(x)
    fresh = ours._codebook.cluster_size[0] == 2.7
    assert fresh.any()
    distance = (ours._codebook.codes()[0][fresh][:, None] - x.flatten(0, 1)).norm(dim=-1)
    assert (distance.min(-1).values < 1e-4).all()


def test_a_shared_codebook_learns_by_its_in_place_optimizer():
    options = {"learnable_codebook": True, "ema_update": False, "shared_codebook": True}
    optimizer = {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    peer, ours = pair("ResidualVQ", **BASE, num_quantizers=3, **options, **optimizer)
    before = ours.codebooks.detach().clone()
    x = torch.randn(2, 64, 16)
    for _ in range(3):
        losses = [layer(x)[2] for layer in (peer, ours)]
    assert torch.equal(peer.codebooks, before) and not torch.equal(ours.codebooks, before)
    assert losses[1].sum() < losses[0].sum()


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("ResidualFSQ", {"levels": [5, 5, 5], "num_quantizers": 3, "orthogonal_rotation": True}),
        ("ResidualLFQ", {"dim": 6, "codebook_size": 64, "num_quantizers": 3, "spherical": True}),
        ("ResidualLFQ", {"dim": 6, "codebook_size": 64, "num_quantizers": 3, "orthogonal_rotation": True}),
    ],
)
def test_rotated_and_spherical_levels_decode(name, kwargs):
    peer, ours = pair(name, **kwargs)
    peer.eval(), ours.eval()
    x = torch.randn(2, 30, 3 if name == "ResidualFSQ" else 6)
    quantized, indices = ours(x)[:2]
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    assert not torch.allclose(peer.get_output_from_indices(indices), quantized)


def test_masked_positions_decode_to_zeros():
    peer, ours = pair("VectorQuantize", **BASE)
    none = torch.full((1, 3), -1)
    assert torch.equal(peer.get_codes_from_indices(none)[0, 0], peer.codebook[-1])
    assert not ours.get_codes_from_indices(none).any()


@pytest.mark.parametrize("name, kwargs", [("VectorQuantize", {}), ("ResidualVQ", {"num_quantizers": 2})])
def test_state_stays_wide(name, kwargs):
    peer, ours = pair(name, **BASE, **kwargs)
    ours.bfloat16()
    assert {v.dtype for k, v in ours.state_dict().items() if "embed" in k or "cluster" in k} == {torch.float32}
    quantized, indices, _ = ours(torch.randn(1, 20, 16, dtype=torch.bfloat16))
    assert quantized.dtype == torch.bfloat16
    peer.bfloat16()
    ours.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(ours.state_dict(), strict=True)


def test_autocast_does_not_touch_the_search():
    peer, ours = pair("VectorQuantize", dim=16, codebook_size=512)
    for layer in (peer, ours):
        layer.eval()
    ours.codebook = torch.randn(512, 16)
    x = torch.randn(1, 500, 16)
    plain = ours(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x)[1], plain)
        ours.train()
        ours._codebook.stochastic = True
        loss = ours(x)[2]
    assert loss.dtype == torch.float32


def test_starved_codes_all_get_their_turn():
    """Fewer rows than dead codes: other codes are served every step."""
    _, ours = pair("VectorQuantize", dim=4, codebook_size=40, threshold_ema_dead_code=2)
    before = ours.codebook.clone()
    for _ in range(30):
        ours(torch.randn(1, 5, 4) + 10)
    assert (ours.codebook != before).any(-1).all()


def test_bad_arguments_are_named():
    _, face = libraries()
    for kwargs in (
        {"straight_through": True},
        {"directional_reparam": True},
        {"use_cosine_sim": True, "learnable_codebook": True, "ema_update": False},
        {"learnable_codebook": True},
        {"sync_update_v": 0.5},
        {"affine_param": True, "use_cosine_sim": True},
    ):
        for error in (ValueError, AssertionError, RuntimeError):
            with pytest.raises(error):
                face.VectorQuantize(8, 16, **kwargs)
    layer = face.VectorQuantize(8, 16)
    with pytest.raises(ValueError, match=r"\[2, 5, 9\].*\[B, ..., 8\]"):
        layer(torch.randn(2, 5, 9))
    with pytest.raises(ValueError, match="mask"):
        layer(torch.randn(2, 5, 8), mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="not both"):
        layer(torch.randn(2, 5, 8), mask=torch.ones(2, 5, dtype=torch.bool), lens=torch.tensor([1, 2]))


def test_explain_names_the_options_that_compare_with_every_code():
    _, face = libraries()
    assert "runs on" in face.VectorQuantize(8, 16).explain()
    text = face.VectorQuantize(8, 16, codebook_diversity_loss_weight=1.0, stochastic_sample_codes=True).explain()
    assert "codebook_diversity_loss_weight" in text and "stochastic_sample_codes" in text
    assert "implicit_neural_codebook" in face.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, implicit_neural_codebook=True).explain()


def test_nothing_but_torch_is_imported():
    code = (
        "import sys; import vqfast.compat.vector_quantize_pytorch as v;"
        "bad = {'vector_quantize_pytorch', 'einops', 'einx', 'loguru', 'triton', 'torch._dynamo'} & set(sys.modules);"
        "assert not bad, bad; assert v.residual_vq.ResidualVQ is v.ResidualVQ"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_the_recipe_for_code_that_cannot_be_edited():
    text = (Path(__file__).parents[2] / "docs/COMPAT.md").read_text()
    recipe = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sys.modules" in block)
    code = recipe + (
        "from vector_quantize_pytorch import FSQ, Sequential\n"
        "from vector_quantize_pytorch.finite_scalar_quantization import FSQ as same\n"
        "import vector_quantize_pytorch.residual_vq as module\n"
        "assert same is FSQ and module.ResidualVQ.__module__.startswith('vqfast.'), module\n"
        "Sequential(same([5, 5]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# ---- memory ------------------------------------------------------------------------------------------------------------------

ROWS, CODES = 4096, 8192
OPTIONS = {
    "default": ("VectorQuantize(8, K)", {}),
    "cosine": ("VectorQuantize(8, K, use_cosine_sim=True)", {}),
    "learnable": ("VectorQuantize(8, K, learnable_codebook=True, ema_update=False)", {}),
    "heads, dead codes": ("VectorQuantize(8, K, threshold_ema_dead_code=2, heads=2, codebook_dim=4)", {}),
    "k-means": ("VectorQuantize(8, K, kmeans_init=True, kmeans_iters=2)", {}),
    "orthogonal": ("VectorQuantize(8, K, orthogonal_reg_weight=1.)", {}),
    "diversity": ("VectorQuantize(8, K, codebook_diversity_loss_weight=1.)", {}),
    "cross entropy": ("VectorQuantize(8, K, commitment_use_cross_entropy_loss=True)", {}),
    "stochastic": ("VectorQuantize(8, K, stochastic_sample_codes=True)", {}),
    "k nearest": ("VectorQuantize(8, K)", {"topk": 2}),
    "residual": ("ResidualVQ(dim=8, codebook_size=K, num_quantizers=2)", {}),
    "sim": ("SimVQ(8, K)", {}),
    "lookup-free": ("LFQ(dim=13)", {}),
}
# Memory that is freed goes back to the system (mallopt), so that the resident set is what lives.
MEASURE = """
import ctypes, json, sys, torch, vqfast.compat.vector_quantize_pytorch as v
torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 65536)

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def run(layer, x, call):
    out = layer(x, **call)
    (out[0].sum() + out[2].sum()).backward()

peaks = {}
N, K, options = json.loads(sys.argv[1])
for name, (make, call) in options.items():
    kind, arguments = make.split("(", 1)
    layer = LAYERS[name]()
    x = torch.randn(1, N, 13 if kind == "LFQ" else 8).requires_grad_()
    run(layer, x[:, :K // 64].detach().requires_grad_(), call)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    run(layer, x, call)
    peaks[name] = resident("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def peaks():
    """Extra memory at the peak of a training step, by option; measured in one process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not report peaks of resident memory")
    layers = ", ".join(f"{name!r}: lambda: v.{make}" for name, (make, _) in OPTIONS.items())
    code = MEASURE.replace("peaks = {}", f"K = {CODES}\nLAYERS = {{{layers}}}\npeaks = {{}}")
    arguments = json.dumps([ROWS, CODES, OPTIONS])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_holds_n_x_k(option, peaks):
    """An N x K matrix of single bytes is 32 MiB here; the other library holds several of float32."""
    assert peaks[option] < ROWS * CODES, peaks

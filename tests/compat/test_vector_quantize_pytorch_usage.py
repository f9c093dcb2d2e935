"""The faces of vector_quantize_pytorch's layers as projects use them: read-me shapes, round trips, transforms of torch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vqfast.compat.vector_quantize_pytorch as vector_quantize_pytorch
from vqfast.compat.vector_quantize_pytorch import (
    FSQ,
    LFQ,
    GroupedResidualVQ,
    LatentQuantize,
    ResidualFSQ,
    ResidualLFQ,
    ResidualSimVQ,
    ResidualVQ,
    Sequential,
    SimVQ,
    VectorQuantize,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kwargs", [{}, {"use_cosine_sim": True}, {"codebook_dim": 16}, {"rotation_trick": False}], ids=str)
def test_training_brings_codes_and_rows_together(kwargs):
    layer = VectorQuantize(dim=32, codebook_size=64, **kwargs)
    x = torch.randn(1, 512, 32)
    first = layer(x)[2]
    for _ in range(30):
        quantized, indices, loss = layer(x)
    assert quantized.shape == x.shape and indices.shape == (1, 512) and loss < first
    assert len(indices.unique()) > 1


def test_evaluation_decodes_to_what_it_returned():
    layer = VectorQuantize(dim=64, codebook_size=128).eval()
    x = torch.randn(1, 256, 64)
    quantized, indices, loss = layer(x)
    assert torch.equal(quantized, layer.get_output_from_indices(indices)) and loss == 0
    loss += 1
    assert layer(x)[2] == 0


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lens_are_a_shorter_input(train):
    layer = VectorQuantize(dim=32, codebook_size=64, decay=1.0).train(train)
    x = torch.randn(1, 100, 32)
    quantized, indices, loss = layer(x, lens=torch.tensor([50]))
    q, i, l = layer(x[:, :50])
    assert torch.equal(quantized[:, :50], q) and torch.equal(indices[:, :50], i) and torch.equal(loss, l)
    assert not quantized[:, 50:].any() and (indices[:, 50:] == -1).all()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", [{}, {"shared_codebook": True}, {"use_cosine_sim": True}, {"implicit_neural_codebook": True}], ids=str)
def test_residual_round_trip(kwargs, train):
    layer = ResidualVQ(dim=16, num_quantizers=4, codebook_size=32, **kwargs).train(train)
    quantized, indices, _ = layer(torch.randn(1, 64, 16), freeze_codebook=train)
    again = layer.get_output_from_indices(indices)
    torch.testing.assert_close(again, quantized)
    if not kwargs:
        assert torch.equal(again, quantized)


def test_image_with_heads():
    layer = VectorQuantize(dim=64, codebook_dim=8, heads=8, separate_codebook_per_head=True, codebook_size=96, accept_image_fmap=True)
    quantized, indices, _ = layer(torch.randn(1, 64, 8, 8))
    assert quantized.shape == (1, 64, 8, 8) and indices.shape == (1, 8, 8, 8) and layer.codebook.shape == (8, 96, 8)


def test_the_best_k_and_learning_from_indices_later():
    at_once = VectorQuantize(dim=16, codebook_size=32)
    later = copy.deepcopy(at_once)
    x = torch.randn(2, 64, 16)
    _, best, _ = at_once(x)
    before = later.codebook.clone()
    _, indices, losses = later(x, topk=3)
    assert torch.equal(later.codebook, before) and indices.shape == losses.shape == (2, 64, 3)
    assert torch.equal(indices[..., 0], best) and (losses.diff(dim=-1) >= 0).all()
    later.update_ema_indices(x, indices[..., :1])
    torch.testing.assert_close(later.codebook, at_once.codebook)


def test_weights_stop_codes():
    layer = VectorQuantize(dim=8, codebook_size=16)
    before = layer.codebook.clone()
    weight = (torch.arange(16) < 8).float()
    layer(torch.randn(1, 200, 8), ema_update_weight=weight)
    moved = (layer.codebook - before).abs().amax(-1) > 1e-3
    assert moved[:8].any() and not moved[8:].any()


def test_own_codebook_transform():
    layer = VectorQuantize(dim=8, codebook_size=16).eval()
    shift = torch.randn(1, 20, 1, 8)
    x = torch.randn(1, 20, 8)
    quantized, indices, _ = layer(x, codebook_transform_fn=lambda codes: codes[:, None, None] + shift)
    codes = layer.codebook[None, None] + shift  # [1, 20, 16, 8]
    distance = (x[:, :, None] - codes).norm(dim=-1)
    assert torch.equal(indices, distance.argmin(-1))
    torch.testing.assert_close(quantized, codes.gather(2, indices[..., None, None].expand(-1, -1, 1, 8))[:, :, 0])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: FSQ([8, 5, 5, 5]), (1, 64, 4)),
        (lambda: FSQ([8, 5, 5, 5]), (1, 4, 6, 6)),
        (lambda: LFQ(codebook_size=256, dim=8), (1, 8, 6, 6)),
        (lambda: LFQ(codebook_size=256, dim=8, spherical=True), (1, 64, 8)),
        (lambda: LFQ(codebook_size=16, dim=16, num_codebooks=4), (1, 64, 16)),
        (lambda: LatentQuantize([5, 5, 8], dim=16), (1, 16, 6, 6)),
    ],
)
def test_scalar_quantizers_decode_to_the_same_bits(make, shape, train):
    layer = make().train(train)
    quantized, indices = layer(torch.rand(shape) * 2 - 1)[:2]
    assert quantized.shape == shape and torch.equal(quantized, layer.indices_to_codes(indices))


@pytest.mark.parametrize(
    "make, dim",
    [
        (lambda: ResidualFSQ(levels=[5, 5, 3, 3], num_quantizers=8, dim=16), 16),
        (lambda: ResidualLFQ(dim=16, codebook_size=256, num_quantizers=8), 16),
        (lambda: ResidualSimVQ(dim=16, codebook_size=64, num_quantizers=4), 16),
    ],
)
def test_residual_scalar_quantizers_decode_to_the_same_bits(make, dim):
    layer = make().eval()
    quantized, indices = layer(torch.randn(1, 64, dim))[:2]
    assert torch.equal(quantized, layer.get_output_from_indices(indices))


def test_a_project_changes_its_import_only():
    module = vector_quantize_pytorch
    model = Sequential(nn.Conv1d(4, 8, 3, padding=1), module.VectorQuantize(8, 32, channel_last=False), nn.Conv1d(8, 4, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(4, 4, 50)
    losses = []
    for _ in range(40):
        y, _, commitment = model(x)
        loss = (y - x).square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.fns[1].codebook = torch.zeros(32, 8)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model.eval()(x)[0], other.eval()(x)[0])


HALVES = {
    "default": (lambda: VectorQuantize(8, 16), {}),
    "the k nearest": (lambda: VectorQuantize(8, 16), {"topk": 2}),
    "residual": (lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3), {}),
    "beams": (lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, beam_size=2), {}),
    "sim": (lambda: SimVQ(8, 16), {}),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", HALVES)
def test_half_precision_comes_out_as_it_went_in(case, train):
    """Outputs have x's dtype, losses are float32, whether or not the module is in half precision too."""
    make, call = HALVES[case]
    for layer in (make().bfloat16(), make()):
        quantized, _, loss = layer.train(train)(torch.randn(2, 20, 8).bfloat16(), **call)
        assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32


@pytest.mark.parametrize("layer, rows, default", [(64, 64, 32), (32, 64, 32), (64, 32, 32), (64, 64, 64), (64, 32, 64)])
def test_gumbel_straight_through_in_float64(layer, rows, default):
    """In float64 where x or the codes are; the gradient is that of float32 to its rounding."""
    dtypes, grads = {32: torch.float32, 64: torch.float64}, []
    x, codes = torch.randn(1, 5, 4), torch.randn(8, 4)
    torch.set_default_dtype(dtypes[default])
    try:
        for width, given in ((32, x), (layer, x.to(dtypes[rows]))):
            own = VectorQuantize(4, 8, straight_through=True, rotation_trick=False, route_gradients_to_input=False)
            own = own.to(dtypes[width])
            own.codebook = codes
            given.requires_grad_()
            quantized, _, loss = own(given)
            (quantized.square().sum() + loss).backward()
            assert quantized.dtype == given.dtype and given.grad.any()
            grads.append(given.grad)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(grads[1], grads[0], check_dtype=False)


COPIED = {
    "default": lambda: VectorQuantize(8, 16, threshold_ema_dead_code=2, kmeans_init=True),
    "stochastic": lambda: VectorQuantize(8, 16, stochastic_sample_codes=True),
    "affine": lambda: VectorQuantize(8, 16, affine_param=True),
    "shared": lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True),
    "implicit": lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, implicit_neural_codebook=True),
    "sim": lambda: ResidualSimVQ(dim=8, codebook_size=16, num_quantizers=2),
    "spherical": lambda: LFQ(dim=8, spherical=True),
    "scalar": lambda: ResidualFSQ(levels=[5, 5], num_quantizers=2, dim=8),
}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", COPIED)
def test_copies_go_on_as_the_layer_would(case, way):
    layer, x = COPIED[case](), torch.randn(2, 40, 8)
    layer(x)
    other = way(layer)
    if case == "shared":
        assert other.layers[0]._codebook is other.layers[2]._codebook
    results = []
    for each in (layer, other):
        torch.manual_seed(1)
        results.append([*each(x)[:2], *each.eval()(x)[:2], *each.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


EMPTY = {
    "default": (lambda: VectorQuantize(8, 16), (2, 0, 8)),
    "no batch": (lambda: VectorQuantize(8, 16), (0, 5, 8)),
    "single tokens": (lambda: VectorQuantize(8, 16), (0, 8)),
    "image, heads": (lambda: VectorQuantize(8, 16, accept_image_fmap=True, heads=2, codebook_dim=4), (2, 8, 0, 4)),
    "dead codes": (lambda: VectorQuantize(8, 16, threshold_ema_dead_code=2), (2, 0, 8)),
    "k-means": (lambda: VectorQuantize(8, 16, kmeans_init=True), (2, 0, 8)),
    "affine": (lambda: VectorQuantize(8, 16, affine_param=True), (2, 0, 8)),
    "stochastic": (lambda: VectorQuantize(8, 16, stochastic_sample_codes=True), (2, 0, 8)),
    "cross entropy": (lambda: VectorQuantize(8, 16, commitment_use_cross_entropy_loss=True), (2, 0, 8)),
    "diversity": (lambda: VectorQuantize(8, 16, codebook_diversity_loss_weight=1.0), (2, 0, 8)),
    "diversity, no batch": (lambda: VectorQuantize(8, 16, codebook_diversity_loss_weight=1.0), (0, 5, 8)),
    "diversity, single tokens": (lambda: VectorQuantize(8, 16, codebook_diversity_loss_weight=1.0), (0, 8)),
    "diversity, images": (
        lambda: VectorQuantize(8, 16, codebook_diversity_loss_weight=1.0, accept_image_fmap=True),
        (0, 8, 3, 4),
    ),
    "diversity, residual": (
        lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, codebook_diversity_loss_weight=1.0),
        (0, 5, 8),
    ),
    "diversity, implicit": (
        lambda: ResidualVQ(
            dim=8, codebook_size=16, num_quantizers=2, codebook_diversity_loss_weight=1.0, implicit_neural_codebook=True
        ),
        (0, 5, 8),
    ),
    "orthogonal": (lambda: VectorQuantize(8, 16, orthogonal_reg_weight=1.0, orthogonal_reg_active_codes_only=True), (2, 0, 8)),
    "residual": (lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True), (2, 0, 8)),
    "beams": (lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, beam_size=2), (2, 0, 8)),
    "implicit": (lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, implicit_neural_codebook=True), (2, 0, 8)),
    "grouped": (lambda: GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2), (2, 0, 8)),
    "sim": (lambda: SimVQ(8, 16), (2, 0, 8)),
    "lookup-free": (lambda: LFQ(dim=4), (2, 0, 4)),
    "residual lookup-free": (lambda: ResidualLFQ(dim=8, codebook_size=16, num_quantizers=3), (2, 0, 8)),
    "latent": (lambda: LatentQuantize([5, 5], dim=2), (2, 2, 0)),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", EMPTY)
def test_no_rows_at_all(case, train):
    make, shape = EMPTY[case]
    layer = make().train(train)
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, loss = layer(x)
    assert quantized.shape == shape and indices.numel() == 0 and (loss == 0).all()
    if train:
        (quantized.sum() + loss.sum()).backward()
    assert all(value.isfinite().all() for value in layer.state_dict().values())


# ---- transforms of torch -----------------------------------------------------------------------------------------------------

COMPILED = {
    "default": (lambda: VectorQuantize(8, 16), (2, 20, 8)),
    "heads, cosine": (
        lambda: VectorQuantize(8, 16, use_cosine_sim=True, heads=2, codebook_dim=4, separate_codebook_per_head=True),
        (2, 20, 8),
    ),
    "learnable": (lambda: VectorQuantize(8, 16, learnable_codebook=True, ema_update=False), (2, 20, 8)),
    "image, cross entropy": (
        lambda: VectorQuantize(8, 16, accept_image_fmap=True, codebook_dim=4, commitment_use_cross_entropy_loss=True),
        (2, 8, 5, 4),
    ),
    "grouped residual": (lambda: GroupedResidualVQ(dim=8, codebook_size=16, num_quantizers=3, groups=2), (2, 20, 8)),
    "shared residual, beams": (
        lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True, beam_size=2),
        (2, 20, 8),
    ),
    "sim": (lambda: SimVQ(8, 16), (2, 20, 8)),
    "lookup-free": (lambda: LFQ(dim=4), (2, 20, 4)),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", COMPILED)
def test_one_compiled_graph(case, train):
    """No graph break, and the same results, gradients and state as eager."""
    make, shape = COMPILED[case]
    torch._dynamo.reset()
    eager = make().train(train)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [layer(given) for layer, given in zip((eager, compiled), inputs, strict=True)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a)
        if train:
            for out, given in zip(results, inputs, strict=True):
                (out[0].sum() + out[2].sum()).backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_dead_codes_in_one_compiled_graph():
    torch._dynamo.reset()
    layer = VectorQuantize(8, 16, threshold_ema_dead_code=2)
    before = layer.codebook.clone()
    x = torch.randn(1, 40, 8) + 5
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    replaced = (layer._codebook.cluster_size[0] == 2).nonzero().flatten()
    assert len(replaced) and all((x[0] == layer.codebook[k]).all(-1).any() for k in replaced)
    assert not torch.equal(layer.codebook, before)


@pytest.mark.parametrize("case", COMPILED)
def test_export_of_evaluation(case):
    make, shape = COMPILED[case]
    layer, x = make().eval(), torch.randn(shape)
    program = torch.export.export(layer, (x,)).module()
    for a, b in zip(program(x), layer(x), strict=True):
        torch.testing.assert_close(a, b)


def test_a_forward_repeated_in_backward_teaches_nothing():
    once = VectorQuantize(8, 16)
    again = copy.deepcopy(once)
    x = torch.randn(1, 64, 8, requires_grad=True)
    once(x)[0].sum().backward()
    checkpoint(lambda t: again(t)[0], x, use_reentrant=False).sum().backward()
    assert torch.equal(once.codebook, again.codebook)

"""Priors: causality without blind spot, likelihoods that sum to one, conditioning, the papers' sizes, VQ-VAE-2."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from vqfast.models import PRESETS
from vqfast.models.pixelcnn import PIXELCNN_PRESETS, GatedPixelCNN, PixelCNN
from vqfast.models.pixelsnail import PIXELSNAIL_PRESETS, PixelSNAIL
from vqfast.models.prior_blocks import CausalAttention, CausalConv2d, GatedLayer, place_features
from vqfast.models.priors import HierarchicalPrior, image_bits_per_dim
from vqfast.models.vqvae import VQVAE
from vqfast.models.vqvae2 import VQVAE2

TINY = {
    GatedPixelCNN: dict(channels=8, layers=3, first_kernel_size=5, head_channels=16),
    PixelCNN: dict(channels=8, layers=2, first_kernel_size=5, head_channels=16),
    PixelSNAIL: dict(
        channels=8, blocks=2, layers=1, residual_channels=10, first_kernel_size=5, attention_heads=2, key_channels=4,
        value_channels=3, output_layers=1,
    ),
}  # fmt: skip
KINDS = list(TINY)


def build(kind, seed=0, scale=2.0, **fields):
    """A small prior with weights large enough that every path matters."""
    torch.manual_seed(seed)
    prior = kind(**{**TINY[kind], "codebook_size": 4, **fields}).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.mul_(scale)
    return prior


def name(value):
    return getattr(value, "__name__", str(value))


def reach(prior, height, width):
    """seen[i, j, a, b]: does logit (i, j) depend on the code at (a, b)? By the gradient to the embedded codes, in
    float64."""
    prior = prior.double()
    x = torch.randn(
        1, prior.config.channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    seen = torch.zeros(height, width, height, width, dtype=torch.bool)
    for i, j in itertools.product(range(height), range(width)):
        leaf = x.clone().requires_grad_()
        logits = prior._network(leaf, None, None)
        (grad,) = torch.autograd.grad(logits[0, :, i, j].square().sum(), leaf)
        seen[i, j] = grad[0].abs().amax(0) > 0
    return seen


# ---- causality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_no_logit_sees_its_own_code_or_a_later_one(kind):
    height, width = 5, 6
    seen = reach(build(kind), height, width).reshape(height * width, height * width)
    assert not seen.triu().any()


@pytest.mark.parametrize("kind", [GatedPixelCNN, PixelSNAIL], ids=name)
def test_every_earlier_code_is_seen(kind):
    """No blind spot: with enough layers, all of the past reaches a logit."""
    height, width = 5, 6
    fields = dict(layers=8) if kind is GatedPixelCNN else dict(layers=3)
    # Scale 1: larger weights would saturate gates, whose float64 slope can be exactly zero.
    seen = reach(build(kind, scale=1.0, **fields), height, width).reshape(height * width, height * width)
    assert torch.equal(seen, torch.ones_like(seen).tril(-1))


def test_vertical_stack_sees_no_code_of_its_row():
    torch.manual_seed(0)
    first, second = GatedLayer(4, 5, True, 0, 0), GatedLayer(4, 3, False, 0, 0)
    for row in range(4):
        x = torch.randn(1, 4, 4, 5, requires_grad=True)
        v, _ = second(*first(x, x, None, None), None, None)
        (grad,) = torch.autograd.grad(v[0, :, row].sum(), x)
        assert not grad[0, :, row:].any()
        assert row == 0 or grad[0, :, :row].any()


def test_plain_pixelcnn_has_its_blind_spot():
    """A fact of the architecture, kept visible: right of the cone above, the plain PixelCNN sees nothing."""
    seen = reach(build(PixelCNN, scale=1.0, layers=6), 5, 8)
    assert not seen[4, 1, 3, 7] and seen[4, 1, 3, 2]


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 3)], ids=str)
def test_small_maps(kind, size):
    prior = build(kind)
    logits = prior(torch.zeros(2, *size, dtype=torch.int64))
    assert logits.shape == (2, 4, *size) and logits.isfinite().all()


# ---- blocks against a plain reference ----------------------------------------------------------------------


@pytest.mark.parametrize("include_center", [False, True])
def test_causal_conv_equals_a_masked_convolution(include_center):
    torch.manual_seed(1)
    layer = CausalConv2d(3, 4, 5, include_center).double()
    full = torch.zeros(4, 3, 5, 5, dtype=torch.float64)
    full[:, :, :2], full[:, :, 2:3, : 2 + include_center] = layer.above.weight.detach(), layer.row.weight.detach()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, full, layer.row.bias, padding=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_gated_layer_equals_full_masked_kernels(first):
    """Eq. 4 and figure 2 of the paper, written with k x k kernels whose masked part is zero, class and condition
    included."""
    torch.manual_seed(2)
    c, k = 3, 3
    layer = GatedLayer(c, k, first, classes=5, condition_channels=2).double()
    v, h = torch.randn(2, 2, c, 4, 5, dtype=torch.float64)
    condition, label = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.tensor([3, -1])
    vertical = torch.zeros(2 * c, c, k, k, dtype=torch.float64)
    vertical[:, :, : 1 + (not first)] = layer.vertical.weight.detach()
    horizontal = torch.zeros(2 * c, c, 1, k, dtype=torch.float64)
    horizontal[:, :, :, : 1 + (not first)] = layer.horizontal.weight.detach()
    embedded = torch.stack([layer.classes.weight[3], torch.zeros(4 * c, dtype=torch.float64)])[:, :, None, None]
    extra_v, extra_h = (embedded + F.conv2d(condition, layer.condition.weight)).chunk(2, 1)
    summed = F.conv2d(v, vertical, layer.vertical.bias, padding=1) + extra_v
    wide = F.conv2d(h, horizontal, layer.horizontal.bias, padding=(0, 1)) + extra_h
    wide = wide + F.conv2d(summed, layer.vertical_to_horizontal.weight)
    gate = lambda x: x[:, :c].tanh() * x[:, c:].sigmoid()  # noqa: E731
    expected = F.conv2d(gate(wide), layer.residual.weight, layer.residual.bias) + (0 if first else h)
    got_v, got_h = layer(v, h, label, condition)
    torch.testing.assert_close(got_v, gate(summed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_h, expected, rtol=1e-12, atol=1e-12)


def test_attention_equals_its_formula():
    torch.manual_seed(3)
    attention = CausalAttention(6, 5, heads=2, key_channels=4, value_channels=3).double()
    x, codes = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    place = place_features(3, 4, codes).expand(2, -1, -1, -1)
    before = torch.zeros_like(codes)
    for t in range(1, 12):
        before[..., t // 4, t % 4] = codes[..., (t - 1) // 4, (t - 1) % 4]
    inputs = [(x, place), (x, before, place), (x, before)]
    layers = [attention.query, attention.key, attention.value]
    q, k, v = (layer(torch.cat(parts, 1)).flatten(2) for layer, parts in zip(layers, inputs))
    expected = torch.zeros(2, 6, 12, dtype=torch.float64)
    for b, head, t in itertools.product(range(2), range(2), range(12)):
        rows = slice(head * 4, head * 4 + 4)
        scores = torch.stack([(q[b, rows, t] * k[b, rows, s]).sum() / 2 for s in range(t + 1)])
        values = v[b, head * 3 : head * 3 + 3, : t + 1]
        expected[b, head * 3 : head * 3 + 3, t] = values @ scores.softmax(0)
    got = attention(x, codes, place)
    torch.testing.assert_close(got.flatten(2), expected, rtol=1e-12, atol=1e-12)


# ---- likelihood --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_probabilities_of_all_maps_sum_to_one(kind):
    prior = build(kind, codebook_size=3).double()
    every = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 2, 3)
    log_prob = prior.log_prob(every)
    assert log_prob.dtype == torch.float64
    assert abs(torch.logsumexp(log_prob, 0).item()) < 1e-12
    assert log_prob.std() > 0.1, "all maps nearly equally likely: the test would not notice a wrong conditional"


def test_a_hierarchy_sums_to_one_over_both_levels():
    top = build(GatedPixelCNN, codebook_size=2, classes=2).double()
    bottom = build(PixelSNAIL, codebook_size=2, condition_codes=2, condition_channels=6, condition_layers=1).double()
    both = HierarchicalPrior([bottom, top])
    every = torch.tensor(list(itertools.product(range(2), repeat=5)))
    levels = [every[:, 1:].view(-1, 2, 2), every[:, :1].view(-1, 1, 1)]
    labels = torch.ones(len(every), dtype=torch.int64)
    log_prob = both.log_prob(levels, labels)
    assert abs(torch.logsumexp(log_prob, 0).item()) < 1e-12
    expected = top.log_prob(levels[1], labels) + bottom.log_prob(levels[0], None, levels[1])
    torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(both.bits_per_dim(levels, 12, labels), -expected / math.log(2) / 12)


def test_bits_of_a_uniform_prior():
    prior = build(GatedPixelCNN, codebook_size=8)
    torch.nn.init.zeros_(prior.head.second.weight)
    torch.nn.init.zeros_(prior.head.second.bias)
    codes = torch.randint(8, (3, 4, 5))
    torch.testing.assert_close(prior.bits_per_code(codes), torch.full((3,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(prior.loss(codes), torch.tensor(math.log(8)))


def test_training_lowers_the_loss_below_the_entropy_of_single_codes():
    torch.manual_seed(0)
    prior = GatedPixelCNN(**TINY[GatedPixelCNN], codebook_size=4)
    rows = torch.randint(4, (64, 6, 1))
    codes = (rows + torch.arange(6)) % 4  # each row counts up from a random start
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior.loss(codes)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * math.log(4), "every single code is uniform, but five of six follow from their neighbour"


# ---- conditioning, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_label_and_condition_matter_and_no_label_is_zeros(kind):
    prior = build(kind, classes=3, condition_codes=5, condition_channels=6, condition_layers=1)
    codes, condition = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64)
    run = lambda label, c=condition: prior(codes, torch.tensor([label]), c)  # noqa: E731
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), run(0, condition + 1))
    with torch.no_grad():
        for module in prior.modules():
            if isinstance(getattr(module, "classes", None), torch.nn.Embedding):
                module.classes.weight.zero_()
    torch.testing.assert_close(run(2), run(-1))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(codes=torch.zeros(1, 4, 4)), ValueError, "int64"),
        (dict(codes=torch.full((1, 4, 4), 4)), IndexError, "0..3"),
        (dict(labels=None), ValueError, "3 classes"),
        (dict(labels=torch.tensor([3])), IndexError, "labels"),
        (dict(labels=torch.tensor([0, 1])), ValueError, r"\[1\] int64"),
        (dict(condition=None), ValueError, "level above"),
        (dict(condition=torch.zeros(1, 4, 4, dtype=torch.int64)), ValueError, "condition_scale"),
    ],
    ids=lambda v: "",
)
def test_errors(change, error, says):
    prior = build(GatedPixelCNN, classes=3, condition_codes=5, condition_channels=6)
    good = dict(
        codes=torch.zeros(1, 4, 4, dtype=torch.int64),
        labels=torch.tensor([0]),
        condition=torch.zeros(1, 2, 2, dtype=torch.int64),
    )
    with pytest.raises(error, match=says):
        prior(**{**good, **change})


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (GatedPixelCNN, dict(kernel_size=4), "odd"),
        (GatedPixelCNN, dict(channels=0), "at least 1"),
        (PixelCNN, dict(channels=7), "even"),
        (PixelSNAIL, dict(dropout=1.0), "dropout"),
    ],
    ids=lambda v: "",
)
def test_bad_settings(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        kind(**fields)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_saved_and_loaded_priors_are_equal(kind, tmp_path):
    prior = build(kind, classes=2)
    loaded = kind.from_pretrained(prior.save_pretrained(tmp_path / "prior"))
    codes, labels = torch.zeros(1, 3, 3, dtype=torch.int64), torch.tensor([1])
    assert loaded.config == prior.config
    assert torch.equal(loaded(codes, labels), prior(codes, labels))


# ---- the papers' sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [*PIXELCNN_PRESETS, *PIXELSNAIL_PRESETS])
def test_presets_build_and_run_on_the_meta_device(preset):
    config = {**PIXELCNN_PRESETS, **PIXELSNAIL_PRESETS}[preset]
    kind = {"PixelCNNConfig": PixelCNN, "GatedPixelCNNConfig": GatedPixelCNN, "PixelSNAILConfig": PixelSNAIL}[
        type(config).__name__
    ]
    with torch.device("meta"):
        prior = kind(config)
        codes = torch.zeros(1, 32, 32, dtype=torch.int64)
        labels = torch.zeros(1, dtype=torch.int64) if config.classes else None
        condition = torch.zeros(1, 16, 16, dtype=torch.int64) if config.condition_codes else None
        assert prior(codes, labels, condition).shape == (1, config.codebook_size, 32, 32)


def test_parameter_count_of_the_gated_pixelcnn():
    """Every weight is an unmasked tap: counted by hand for 15 layers of 128 channels, kernels 7 and 3, K = 512."""
    c, k, head = 128, 512, 512
    vertical, horizontal = [3 * 7] + [2 * 3] * 14, [3] + [2] * 14
    layers = sum(2 * c * c * (v + h) + 2 * 2 * c + (2 * c) ** 2 + c * c + c for v, h in zip(vertical, horizontal))
    expected = k * c + layers + (c + 1) * head + (head + 1) * k
    with torch.device("meta"):
        assert sum(p.numel() for p in GatedPixelCNN().parameters()) == expected


# ---- VQ-VAE-2 ----------------------------------------------------------------------------------------------


def small_vqvae2(levels=3, **fields):
    torch.manual_seed(4)
    settings = dict(
        hidden=8,
        residual_hidden=4,
        residual_layers=1,
        stages=1,
        dims=(3, 4, 5)[:levels],
        codebook_sizes=(6, 7, 8)[:levels],
    )
    return VQVAE2(**{**settings, **fields})


def test_vqvae2_codes_decode_to_what_forward_reconstructs():
    model = small_vqvae2().eval()
    x = torch.rand(2, 3, 16, 24) - 0.5
    out, codes = model(x), model.encode(x)
    assert [tuple(c.shape) for c in codes] == [(2, 8, 12), (2, 4, 6), (2, 2, 3)]
    assert [c.shape[1:] for c in codes] == [torch.Size(s) for s in model.latent_shapes(16, 24)]
    for level, code in zip(out.levels, codes):
        assert torch.equal(level.indices, code)
    # The same convolutions on the same codes; only the straight-through x + (q - x) rounds differently.
    torch.testing.assert_close(model.decode(codes), out.reconstruction, rtol=1e-4, atol=1e-5)
    total = out.reconstruction_loss + sum(level.loss for level in out.levels)
    torch.testing.assert_close(out.loss, total)
    assert (
        abs(model.bits_per_pixel() - sum(c[0].numel() * math.log2(k) for c, k in zip(codes, (6, 7, 8))) / (16 * 24))
        < 1e-9
    )


def test_vqvae2_finer_levels_see_the_coarser_ones():
    """Another coarse code changes the finer codes of the same picture, and the picture of the same fine codes."""
    model = small_vqvae2(2).eval()
    x = torch.rand(4, 3, 16, 16) - 0.5
    fine, coarse = model.encode(x)
    picture = model.decode([fine, coarse])
    assert not torch.equal(model.decode([fine, (coarse + 1) % 7]), picture)
    model.quantizers_[1].set_codebook_(10 * torch.randn(7, 4))
    assert not torch.equal(model.encode(x)[0], fine)


@pytest.mark.parametrize("quantizer", ["ema", "loss"])
def test_vqvae2_trains_every_parameter(quantizer):
    model = small_vqvae2(quantizer=quantizer)
    x = torch.rand(2, 3, 16, 16) - 0.5
    before = [q.codebook.detach().clone() for q in model.quantizers]
    model(x).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    if quantizer == "ema":
        assert all(not torch.equal(b, q.codebook) for b, q in zip(before, model.quantizers))


def test_vqvae2_codebooks_from_k_means_files_and_errors(tmp_path):
    model = small_vqvae2().eval()
    x = torch.rand(8, 3, 16, 16) - 0.5
    before = model(x).loss
    model.init_codebooks_(x)
    assert model(x).loss < before
    loaded = VQVAE2.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert loaded.config == model.config and torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    with pytest.raises(ValueError, match="multiples of 8"):
        model(x[..., :12])
    with pytest.raises(ValueError, match="finest first"):
        model.decode(model.encode(x)[::-1])
    with pytest.raises(ValueError, match="one entry per level"):
        small_vqvae2(codebook_sizes=(4,))


@pytest.mark.parametrize(
    ("preset", "size", "shapes"),
    [("imagenet256", 256, [(64, 64), (32, 32)]), ("ffhq1024", 1024, [(128, 128), (64, 64), (32, 32)])],
)
def test_vqvae2_presets_have_the_papers_shapes(preset, size, shapes):
    with torch.device("meta"):
        model = PRESETS[preset].build()
    assert model.latent_shapes(size, size) == shapes
    assert model.config.codebook_sizes == (512,) * len(shapes) and model.config.dims == (64,) * len(shapes)
    # The final decoder sees all levels: 64 channels each.
    assert model.decoders[0].conv.in_channels == 64 * len(shapes)


def test_bits_of_whole_pictures_add_the_priors_bits_to_the_likelihoods():
    x = torch.rand(2, 3, 16, 16) - 0.5
    one = VQVAE(
        hidden=8, residual_hidden=4, residual_layers=1, dim=4, codebook_size=6, likelihood="discretized_logistic"
    ).eval()
    prior = build(GatedPixelCNN, codebook_size=6)
    got = image_bits_per_dim(one, prior, x)
    wanted = -prior.log_prob(*one.encode(x)).mean() / math.log(2) / (3 * 16 * 16)
    torch.testing.assert_close(got.latents, wanted)
    torch.testing.assert_close(got.total, wanted + one.bits_per_dim(x).reconstruction)
    two = small_vqvae2(2, likelihood="discretized_logistic").eval()
    top = build(GatedPixelCNN, codebook_size=7)
    bottom = build(GatedPixelCNN, codebook_size=6, condition_codes=7, condition_channels=4)
    hierarchy = HierarchicalPrior([bottom, top])
    got = image_bits_per_dim(two, hierarchy, x)
    torch.testing.assert_close(got.latents, hierarchy.bits_per_dim(two.encode(x), 3 * 16 * 16).mean())

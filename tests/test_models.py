"""VQVAE and VAE: Sonnet's architecture, losses, codes, bits, presets, and files that cannot be misread."""

import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from vqfast.models import (
    PRESETS,
    VAE,
    VQVAE,
    ModelFileError,
    VAEConfig,
    VQVAEConfig,
    float_to_pixels,
    get_preset,
    load_pretrained,
    pad_to_multiple,
    pixels_to_float,
)
from vqfast.models import pretrained
from vqfast.models import vae as vae_module

TINY = dict(hidden=8, residual_hidden=4, residual_layers=1, dim=4, codebook_size=16)


def tiny(**fields):
    torch.manual_seed(0)
    return VQVAE(**{**TINY, **fields})


def pictures(batch=2, channels=3, height=16, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pixels_to_float(
        torch.randint(256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)
    )


# ---- architecture ------------------------------------------------------------------------------------------


def sonnet_cifar10(state, x, codes):
    """Sonnet's CIFAR-10 example written out layer by layer on a state dict; `codes` quantizes."""

    def conv(name, h, **options):
        return F.conv2d(h, state[name + ".weight"], state[name + ".bias"], **options)

    def up(name, h):
        return F.conv_transpose2d(h, state[name + ".weight"], state[name + ".bias"], stride=2, padding=1)

    def stack(name, h):
        for i in range(2):
            inner = conv(f"{name}.blocks.{i}.conv3", F.relu(h), padding=1)
            h = h + conv(f"{name}.blocks.{i}.conv1", F.relu(inner))
        return F.relu(h)

    h = F.relu(conv("encoder.down.0", x, stride=2, padding=1))
    h = F.relu(conv("encoder.down.1", h, stride=2, padding=1))
    z = conv("pre_quantizer", stack("encoder.residual", conv("encoder.conv", h, padding=1)))
    h = stack("decoder.residual", conv("decoder.conv", codes(z), padding=1))
    return up("decoder.up.1", F.relu(up("decoder.up.0", h)))


def test_cifar10_preset_is_sonnets_network():
    torch.manual_seed(0)
    model = get_preset("cifar10").build().eval()
    state = model.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items() if name.endswith("weight")}
    block = {"conv3": [32, 128, 3, 3], "conv1": [128, 32, 1, 1]}
    expected = {
        "encoder.down.0": [64, 3, 4, 4],
        "encoder.down.1": [128, 64, 4, 4],
        "encoder.conv": [128, 128, 3, 3],
        "pre_quantizer": [64, 128, 1, 1],
        "decoder.conv": [128, 64, 3, 3],
        "decoder.up.0": [128, 64, 4, 4],
        "decoder.up.1": [64, 3, 4, 4],
    }
    for side in ("encoder", "decoder"):
        expected |= {
            f"{side}.residual.blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()
        }
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()}

    x = pictures(2, 3, 32, 32)
    got = model(x)
    by_hand = sonnet_cifar10(state, x, lambda z: model.quantizer.decode(model.quantizer.encode(z)))
    # The same operations on the same numbers; only the order of the sums inside a convolution may differ.
    torch.testing.assert_close(got.reconstruction, by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.reconstruction_loss, (by_hand - x).square().mean() / 0.06328692405746422)


def test_cifar10_preset_has_sonnets_settings():
    preset = get_preset("cifar10")
    m, t = preset.model, preset.training
    assert (m.hidden, m.residual_hidden, m.residual_layers, m.dim, m.codebook_size) == (128, 32, 2, 64, 512)
    assert (m.commitment_weight, m.quantizer, m.decay, m.rule, m.likelihood) == (
        0.25,
        "ema",
        0.99,
        "debiased",
        "mse",
    )
    assert (t.dataset, t.steps, t.batch_size, t.learning_rate) == ("cifar10", 10_000, 32, 3e-4)
    assert not t.flip


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_depth_and_channels(stages, channels):
    model = tiny(stages=stages, in_channels=channels)
    x = pictures(2, channels, 2**stages * 2, 2**stages * 3)
    out = model(x)
    assert out.reconstruction.shape == x.shape and len(out.levels) == 1
    assert out.levels[0].indices.shape == (2, 2, 3) == (2, *model.latent_shapes(*x.shape[2:])[0])
    assert model.stride == 2**stages


def test_groups_have_their_own_indices():
    model = tiny(groups=2)
    x = pictures()
    indices = model.encode(x)
    assert indices[0].shape == (2, 2, 4, 4) == (2, *model.latent_shapes(16, 16)[0])
    assert model.decode(indices).shape == x.shape
    assert model.bits_per_pixel() == 2 * 4 / 16


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_plain_data_and_build(name):
    preset = PRESETS[name]
    assert preset.name == name
    fields = json.loads(json.dumps(dataclasses.asdict(preset.model)))
    assert type(preset.model)(**pretrained._tuples(fields)) == preset.model
    json.dumps(dataclasses.asdict(preset.training))
    model = preset.build()
    assert preset.training.size % model.stride == 0
    # The VAE that is compared with a VQ-VAE has its encoder, decoder, likelihood and training.
    if name.endswith("vae"):
        other = PRESETS["cifar10-bits" if name == "cifar10-vae" else "cifar10-paper"]
        assert other.training == preset.training
        for field in ("hidden", "residual_hidden", "residual_layers", "stages", "likelihood", "scale"):
            assert getattr(other.model, field) == getattr(preset.model, field)


def test_paper_preset_has_the_papers_latents():
    preset = get_preset("cifar10-paper")
    assert preset.build().latent_shapes(32, 32) == [(10, 8, 8)]
    assert (preset.training.batch_size, preset.training.learning_rate, preset.training.steps) == (
        128,
        2e-4,
        250_000,
    )
    assert PRESETS["imagenet128"].build().latent_shapes(128, 128) == [(32, 32)]


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="cifar10"):
        get_preset("cifar")


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["ema", "loss"])
@pytest.mark.parametrize("likelihood", ["mse", "gaussian", "discretized_logistic"])
def test_loss_is_the_sum_of_its_parts_and_reaches_every_parameter(quantizer, likelihood):
    model = tiny(quantizer=quantizer, likelihood=likelihood)
    out = model(pictures())
    assert out.loss.dtype == out.reconstruction_loss.dtype == torch.float32 and out.loss.ndim == 0
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.levels[0].loss, rtol=0, atol=0)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("quantizer", ["ema", "loss"])
def test_training_sends_information_through_the_codes(quantizer):
    torch.manual_seed(0)
    model = VQVAE(
        hidden=16,
        residual_hidden=8,
        residual_layers=1,
        dim=8,
        codebook_size=32,
        quantizer=quantizer,
        decay=0.9,
        data_variance=0.0125,
    )
    # Pictures with structure: smooth ramps of random direction.
    grid = torch.linspace(-0.5, 0.5, 16)
    slopes = torch.rand(16, 3, 2, 1, 1) - 0.5
    x = slopes[:, :, 0] * grid + slopes[:, :, 1] * grid[:, None]
    model.init_codebooks_(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    error = (model.eval()(x).reconstruction - x).square().mean().detach()
    # A decoder that learned nothing from its codes could at best give the mean picture, with a ratio of 1.
    assert error < 0.8 * (x - x.mean(0)).square().mean()


def test_half_precision_autocast_keeps_losses_in_float32():
    model = tiny(likelihood="discretized_logistic")
    x = pictures()
    plain = model.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.reconstruction.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    # bfloat16 has 8 bits: the untrained network's output is near zero, so the losses differ little.
    torch.testing.assert_close(half.reconstruction_loss, plain.reconstruction_loss, rtol=0.05, atol=0.05)


def test_every_quantizer_setting_arrives():
    settings = dict(commitment_weight=0.7, metric="cosine", groups=2, revive_below=0.5, auto_update=False)
    ema = dict(decay=0.5, eps=1e-3, rule="debiased")
    for fields, kind in (
        (settings | ema, "VectorQuantizerEMA"),
        (settings | dict(quantizer="loss"), "VectorQuantizer"),
    ):
        quantizer = tiny(**fields).quantizer
        assert type(quantizer).__name__ == kind
        expected = {name: value for name, value in fields.items() if name != "quantizer"}
        assert {name: getattr(quantizer, name) for name in expected} == expected
        assert (quantizer.dim, quantizer.codebook_size, quantizer.channel_dim) == (4, 16, 1)


def test_update_once_per_step_when_auto_update_is_off():
    model = tiny(auto_update=False)
    before = model.quantizer.codebook.clone()
    model(pictures())
    assert torch.equal(model.quantizer.codebook, before)
    model.update_()
    assert not torch.equal(model.quantizer.codebook, before)


def test_init_codebooks_puts_codes_among_the_latents():
    model = tiny()
    x = pictures(8)
    error = model.eval()(x).levels[0].commitment_loss
    model.init_codebooks_(x)
    assert model(x).levels[0].commitment_loss < 0.5 * error


# ---- codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_decode_of_encode_is_the_reconstruction(groups):
    model = tiny(groups=groups).eval()
    x = pictures()
    indices = model.encode(x)
    assert [level.dtype for level in indices] == [torch.int64]
    out = model(x)
    assert torch.equal(indices[0], out.levels[0].indices)
    # forward adds z + (q - z) nowhere in eval: the same codes give the same picture, up to one rounding of
    # the latents.
    torch.testing.assert_close(model.decode(indices), out.reconstruction, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.decode(indices), model.decode(indices[0]))


def test_encode_changes_nothing_even_in_training():
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    indices = model.encode(pictures())
    model.decode(indices)
    model.bits_per_dim(pictures(), scale=0.1)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training


def test_samples_depend_on_the_generator_alone():
    model = tiny()
    first, again = (model.sample(3, 8, 12, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (3, 3, 8, 12) and torch.equal(first, again)
    assert not torch.equal(first, model.sample(3, 8, 12, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("model", [tiny(), VAE(hidden=8, residual_hidden=4, dim=4)], ids=["vqvae", "vae"])
def test_wrong_pictures_are_refused_in_words(model):
    with pytest.raises(ValueError, match=r"18x16 pixels.*multiples of 4.*pad_to_multiple"):
        model(pictures(height=18))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model.encode(pictures(channels=1))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(pictures()[0])
    with pytest.raises(TypeError, match="pixels_to_float"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 4"):
        model.sample(1, 15, 16)


def test_wrong_levels_and_indices_are_refused():
    model = tiny()
    indices = model.encode(pictures())
    with pytest.raises(ValueError, match="2 levels"):
        model.decode(indices * 2)
    with pytest.raises(IndexError):
        model.decode([torch.full_like(indices[0], 16)])


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(stages=0), "stages"),
        (dict(hidden=1), "hidden"),
        (dict(dim=64.0), "dim"),
        (dict(dim=10, groups=3), "groups"),
        (dict(quantizer="fsq"), "quantizer"),
        (dict(rule="laplace"), "rule"),
        (dict(likelihood="l1"), "likelihood"),
        (dict(scale="auto"), "scale"),
        (dict(scale=0.0), "scale"),
        (dict(data_variance=float("nan")), "data_variance"),
    ],
)
def test_impossible_settings_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        VQVAEConfig(**fields)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="codebok_size"):
        VQVAE(codebok_size=3)
    with pytest.raises(TypeError, match="VAEConfig"):
        VQVAE(VAEConfig())
    assert VQVAE(VQVAEConfig(**TINY), dim=8).config.dim == 8


# ---- bits per dimension ------------------------------------------------------------------------------------


def test_bits_per_dim_counts_codes_and_pixels():
    model = tiny(likelihood="discretized_logistic", scale="predicted", groups=2).eval()
    x = pictures(3)
    bits = model.bits_per_dim(x)
    assert float(bits.latents) == 2 * 4 * 4 * math.log2(16) / (3 * 16 * 16)
    assert float(bits.total) == float(bits.reconstruction + bits.latents)
    # forward's loss in nats is the same quantity in float32.
    assert float(bits.reconstruction) == pytest.approx(
        float(model(x).reconstruction_loss.detach()) / math.log(2), rel=1e-5
    )
    # An untrained network must not beat 8 bits by much, nor need absurdly many.
    assert 6 < float(bits.reconstruction) < 20


def test_mse_model_takes_a_fitted_scale():
    model = tiny()
    x = pictures()
    with pytest.raises(ValueError, match="fit_logistic_scale"):
        model.bits_per_dim(x)
    assert float(model.bits_per_dim(x, scale=0.2).total) > 7


def test_vae_terms():
    torch.manual_seed(0)
    vae = VAE(hidden=8, residual_hidden=4, dim=4)
    x = pictures()
    mean, log_variance = vae._posterior(x)
    normal = torch.distributions.Normal
    expected = (
        torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).sum()
        / x.numel()
    )
    out = vae(x)
    torch.testing.assert_close(out.kl, expected)
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.kl, rtol=0, atol=0)
    assert out.levels == vae.quantizers == []
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    torch.manual_seed(7)
    loss = vae(x).loss
    torch.manual_seed(7)
    assert float(vae.bits_per_dim(x).total) == pytest.approx(float(loss.detach()) / math.log(2), rel=1e-5)
    assert torch.equal(vae.eval()(x).reconstruction, vae.decode(vae.encode(x)))
    # The noise has the posterior's standard deviation: the moments of 20,000 draws lie within five standard
    # errors.
    draws = vae_module._sample(torch.full((20_000,), 3.0), torch.full((20_000,), math.log(4.0)))
    assert abs(draws.mean() - 3) < 5 * 2 / 20_000**0.5 and abs(draws.std() - 2) < 5 * 2 / 40_000**0.5
    several = [
        vae.bits_per_dim(x, samples=3, generator=torch.Generator().manual_seed(1)).total for _ in range(2)
    ]
    assert several[0] == several[1]


# ---- pixels ------------------------------------------------------------------------------------------------


def test_pixels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    x = pixels_to_float(levels)
    assert torch.equal(float_to_pixels(x), levels) and (x[0], x[255]) == (-0.5, 0.5)
    odd = torch.tensor([-9.0, 9.0, float("nan"), float("inf"), -0.5 + 0.51 / 255])
    assert float_to_pixels(odd).tolist() == [0, 255, 0, 255, 1]
    with pytest.raises(TypeError, match="uint8"):
        pixels_to_float(x)


def test_padding_repeats_the_border_and_can_be_cut_off():
    x = pictures(1, 3, 5, 8)
    padded, (height, width) = pad_to_multiple(x, 4)
    assert padded.shape == (1, 3, 8, 8) and (height, width) == (5, 8)
    assert torch.equal(padded[..., :5, :8], x) and torch.equal(padded[..., 7, :8], x[..., 4, :])
    assert pad_to_multiple(torch.zeros(1, 1, dtype=torch.uint8), 16)[0].shape == (16, 16)


# ---- files -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = tiny(quantizer="ema", likelihood="discretized_logistic").eval()
    model.init_codebooks_(pictures(4))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_saved_model_comes_back_the_same(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (VQVAE.from_pretrained(folder), load_pretrained(folder)):
        assert type(loaded) is VQVAE and loaded.config == model.config and not loaded.training
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(loaded(pictures()).reconstruction, model(pictures()).reconstruction)
        loaded.train()(pictures()).loss.backward()


def test_weights_alone_are_enough(saved):
    model, folder = saved
    (folder / "config.json").unlink()
    assert VQVAE.from_pretrained(folder).config == model.config


def test_half_precision_comes_back_in_half_precision(saved):
    model, folder = saved
    model.to(torch.bfloat16).save_pretrained(folder)
    loaded = VQVAE.from_pretrained(folder)
    assert (
        loaded.encoder.conv.weight.dtype == torch.bfloat16
        and loaded.quantizer.codebook.dtype == torch.float32
    )


def test_vae_is_saved_too(tmp_path):
    vae = VAE(hidden=8, residual_hidden=4, dim=4, scale=0.05)
    vae.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).config == vae.config
    with pytest.raises(ModelFileError, match="holds a VAE, not a VQVAE"):
        VQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 300, -1])
def test_truncated_weights_are_refused(saved, keep):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match="truncated"):
        load_pretrained(saved[1])


def test_one_altered_bit_is_noticed(saved):
    path = saved[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="checksum"):
        load_pretrained(saved[1])


def test_altered_settings_in_the_weights_are_noticed(saved):
    path = saved[1] / "model.safetensors"
    content = path.read_bytes()
    assert content.count(b'commitment_weight\\": 0.25') == 1
    for altered in (
        b'commitment_weight\\": 0.75',
        b'commitment_weight\\": 0.2{',
        b'commitment_weight\\"} 0.25',
    ):
        path.write_bytes(content.replace(b'commitment_weight\\": 0.25', altered))
        with pytest.raises(ModelFileError, match="checksum"):
            load_pretrained(saved[1])


def test_files_of_two_models_do_not_mix(saved, tmp_path):
    tiny(dim=8).save_pretrained(tmp_path / "other")
    (saved[1] / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(ModelFileError, match="config.json does not describe"):
        load_pretrained(saved[1])


def test_foreign_and_missing_files_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no folder"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_pretrained(tmp_path / "empty")
    save_file(saved[0].state_dict(), tmp_path / "empty" / "model.safetensors")
    with pytest.raises(ModelFileError, match="not one that vqfast"):
        load_pretrained(tmp_path / "empty")
    (saved[1] / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="config.json cannot be read"):
        load_pretrained(saved[1])


def test_weights_that_do_not_fit_their_settings_are_refused(tmp_path, monkeypatch):
    model = tiny()
    state = model.state_dict()
    del state["pre_quantizer.bias"]
    state["extra"] = torch.zeros(1)
    state["encoder.conv.bias"] = torch.zeros(9)
    monkeypatch.setattr(model, "state_dict", lambda: state)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelFileError, match=r"encoder.conv.bias is .*\[9\].*extra is unknown; pre_quantizer.bias is missing"
    ):
        load_pretrained(tmp_path)


def test_a_save_that_dies_leaves_the_old_model(saved, monkeypatch):
    import os

    model, folder = saved

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            tiny(dim=8).save_pretrained(folder)
    assert load_pretrained(folder).config == model.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_hub_models_read_and_write_the_same_files(saved, tmp_path):
    pytest.importorskip("huggingface_hub")
    from vqfast.models import hub

    model, folder = saved
    loaded = hub.VQVAE.from_pretrained(str(folder))
    assert type(loaded) is hub.VQVAE and loaded.config == model.config
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert type(load_pretrained(tmp_path / "again")) is VQVAE
    assert torch.equal(loaded(pictures()).reconstruction, model(pictures()).reconstruction)


def test_a_model_exports_whole():
    model, x = tiny(likelihood="discretized_logistic", scale="predicted").eval(), pictures()
    exported = torch.export.export(model, (x,)).module()(x)
    assert torch.equal(exported.reconstruction, model(x).reconstruction)
    assert torch.equal(exported.levels[0].indices, model.encode(x)[0])

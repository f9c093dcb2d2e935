"""vqfast.convert on the real models of transformers, diffusers and vector_quantize_pytorch, small and with random weights."""

import copy
import importlib.machinery
import importlib.util
import sys
import types

import cases
import pytest
import swaps
import torch
from torch.utils._pytree import tree_leaves

import vqfast

K, SIDE = 256, 16
N = 2 * SIDE * SIDE


def peer(name):
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install {name})")


# ---- whole models ----------------------------------------------------------------------------------------------------------


def encodec():
    hf = peer("transformers")
    config = hf.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=K, num_lstm_layers=1, upsampling_ratios=[4, 2])
    model = hf.EncodecModel(config)
    return model, cases.normal(2, 1, 2048) * 0.1, lambda m, x: tuple(m(x, bandwidth=m.config.target_bandwidths[0])[:2])


def dac():
    hf = peer("transformers")
    config = hf.DacConfig(
        encoder_hidden_size=8, hidden_size=32, decoder_hidden_size=32, codebook_size=K, n_codebooks=3, downsampling_ratios=[4, 2],
        upsampling_ratios=[2, 4],
    )  # fmt: skip
    return hf.DacModel(config), cases.normal(2, 1, 2048) * 0.1, lambda m, x: tuple(m(x).to_tuple())


def mimi():
    hf = peer("transformers")
    config = hf.MimiConfig(
        num_filters=4, hidden_size=32, codebook_size=K, codebook_dim=16, vector_quantization_hidden_dimension=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=32, num_quantizers=4,
        upsample_groups=32, upsampling_ratios=[4, 2],
    )  # fmt: skip
    return hf.MimiModel(config), cases.normal(2, 1, 2048) * 0.1, lambda m, x: tuple(m(x)[:2])


def vqmodel():
    model = peer("diffusers").VQModel(num_vq_embeddings=K, latent_channels=4, block_out_channels=(32,), norm_num_groups=4)
    return model, cases.normal(2, 3, SIDE, SIDE), lambda m, x: tuple(m(x, return_dict=False))


def leaves(out):
    return tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))


def xcodec():
    hf = peer("transformers")
    rates = {"downsampling_ratios": [8, 5, 4, 2], "upsampling_ratios": [8, 5, 4, 2]}
    config = hf.XcodecConfig(
        target_bandwidths=[0.5],
        codebook_size=K,
        codebook_dim=40,  # the acoustic and the semantic channels
        acoustic_model_config=hf.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=16, **rates),
        semantic_model_config=hf.HubertConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
    )  # fmt: skip
    return hf.XcodecModel(config), cases.normal(1, 1, 3200) * 0.1, lambda m, x: leaves(dict(m.encode(x)))


def image_tokenizer(family, prefix, **values):
    """An image model of transformers whose quantizer has K codes of 8 channels."""

    def build():
        peer("transformers")
        configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        options = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
        config = getattr(configuration, f"{prefix}VQVAEConfig")(**options | values)
        return getattr(modeling, f"{prefix}VQVAE")(config)

    return build


def chameleon():
    build = image_tokenizer("chameleon", "Chameleon", num_embeddings=K, resolution=SIDE)
    return build(), cases.normal(2, 3, SIDE, SIDE), lambda m, x: leaves(m.encode(x))


def janus():
    build = image_tokenizer("janus", "Janus", num_embeddings=K, num_patches=SIDE // 2)
    return build(), cases.normal(2, 3, SIDE, SIDE), lambda m, x: leaves((m(x), m.encode(x)))


def emu3():
    build = image_tokenizer(
        "emu3", "Emu3", codebook_size=K, double_latent=False, attn_resolutions=[], hidden_size=32, num_attention_heads=2,
        temporal_downsample_factor=2,
    )  # fmt: skip
    sizes = torch.tensor([[SIDE, SIDE]])
    return build(), cases.normal(1, 2, 3, SIDE, SIDE), lambda m, x: leaves(m.encode(x, sizes))


def glm_image():
    build = image_tokenizer("glm_image", "GlmImage", num_embeddings=K)
    return build(), cases.normal(2, 8, SIDE, SIDE), lambda m, x: leaves(m.encode(x))


# Not Higgs, whose whole model needs torchaudio; its codebook is below.
MODELS = {
    function.__name__: function for function in (encodec, dac, mimi, xcodec, chameleon, janus, emu3, glm_image, vqmodel)
}


def give_codes(model):
    """Codebooks that configurations leave at zero."""
    torch.manual_seed(1)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("embed", "embed_sum", "codebook.weight", "embedding.weight")):
            tensor.data.normal_()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_give_the_same_results(name):
    torch.manual_seed(0)
    model, x, run = MODELS[name]()
    give_codes(model)
    with torch.no_grad():
        before = run(model, x)
        state = copy.deepcopy(model.state_dict())
        report = vqfast.convert(model)
        assert report.replaced and not report.skipped, str(report)
        swaps.close(run(model, x), before, roundings=1024)  # decoders add up thousands of products
        report.revert()
        swaps.close(run(model, x), before, roundings=0)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_training_passes_the_same_gradients_through_vqmodel():
    torch.manual_seed(0)
    model, x, run = vqmodel()
    converted = copy.deepcopy(model)
    vqfast.convert(converted)
    swaps.train_both(converted.train(), model.train(), [x], call=run)


# ---- single quantizers -----------------------------------------------------------------------------------------------------


def config_of(**values):
    return types.SimpleNamespace(**values)


def hugging_face(family, name, **values):
    peer("transformers")
    if importlib.util.find_spec("torchaudio") is None and "torchaudio" not in sys.modules:
        # One family imports it for resampling, which no test here does.
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)(config_of(**values))


def codebook(family, name):
    return lambda: hugging_face(family, name, codebook_size=K, codebook_dim=8)


def image_quantizer(family, name):
    return lambda: hugging_face(family, name, num_embeddings=K, embed_dim=8, beta=0.25, num_patches=SIDE)


def rows():
    return cases.normal(2, SIDE * SIDE, 8)


def image():
    return cases.normal(2, 8, SIDE, SIDE)


def call(module, z):
    return module(z)


def encode(module, z):
    return module.encode(z)


QUANTIZERS = {
    "encodec": (codebook("encodec", "EncodecEuclideanCodebook"), rows, encode),
    "mimi": (codebook("mimi", "MimiEuclideanCodebook"), rows, encode),
    "xcodec": (codebook("xcodec", "XcodecEuclideanCodebook"), rows, encode),
    "higgs": (codebook("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerEuclideanCodebook"), rows, encode),
    "dac": (
        lambda: hugging_face("dac", "DacVectorQuantize", codebook_size=K, codebook_dim=8, hidden_size=16),
        lambda: cases.normal(2, 16, SIDE * SIDE),
        call,
    ),
    "chameleon": (image_quantizer("chameleon", "ChameleonVQVAEVectorQuantizer"), image, call),
    "janus": (image_quantizer("janus", "JanusVQVAEVectorQuantizer"), image, call),
    "glm_image": (image_quantizer("glm_image", "GlmImageVQVAEVectorQuantizer"), image, call),
    "emu3": (
        lambda: hugging_face("emu3", "Emu3VQVAEVectorQuantizer", codebook_size=K, embed_dim=8),
        lambda: image()[:, None],
        call,
    ),
}
EVERY_QUANTIZER = pytest.mark.parametrize("name", QUANTIZERS)


def pair(name):
    build, batch, run = QUANTIZERS[name]
    torch.manual_seed(0)
    plain = swaps.randomise(build())
    converted = swaps.twin(plain)
    report = vqfast.convert(converted)
    assert list(report.replaced) == [""], str(report)
    return converted, plain, batch(), run


@EVERY_QUANTIZER
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_quantizers_of_transformers(name, training):
    converted, plain, batch, run = pair(name)
    swaps.train_both(converted.train(training), plain.train(training), [batch], call=run)


@EVERY_QUANTIZER
def test_no_matrix_of_rows_by_codes(name):
    converted, plain, batch, run = pair(name)
    assert swaps.largest(lambda: run(plain, batch)) >= N * K
    assert swaps.largest(lambda: run(converted, batch)) <= N * K // 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codebooks_are_searched_exactly(dtype):
    """The plain search rounds every distance to the module's dtype; the exact one takes the values as they are."""
    plain = swaps.randomise(QUANTIZERS["encodec"][0]())
    plain.embed += 8
    plain = plain.to(dtype)
    converted = swaps.twin(plain)
    assert vqfast.convert(converted).replaced
    z = (rows() + 8).to(dtype)
    truth = torch.cdist(z.double().flatten(0, 1), plain.embed.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(converted.encode(z).flatten(), truth)
    assert (plain.encode(z).flatten() != truth).any(), "if the plain search were right too, this test would show nothing"


@pytest.mark.parametrize("size, dim", [(32768, 4), (16384, 8)])
def test_published_sizes_pass_the_trial(size, dim):
    """Emu3's and Janus' codebooks; many codes in few dimensions are the hardest for the trial's float32 comparison."""
    module = hugging_face("emu3", "Emu3VQVAEVectorQuantizer", codebook_size=size, embed_dim=dim)
    assert vqfast.convert(module).replaced


def test_dispatched_models_are_left_alone():
    """accelerate puts a hook object on modules whose weights it moves."""
    module = QUANTIZERS["dac"][0]()
    module.codebook._hf_hook = object()
    assert "accelerate" in vqfast.convert(module).skipped[""]


# ---- vector_quantize_pytorch -----------------------------------------------------------------------------------------------


def lucidrains(cls, **options):
    library = peer("vector_quantize_pytorch")
    return getattr(library, cls)(**options)


LUCIDRAINS = {
    "plain": ("VectorQuantize", {}, rows),
    "straight through": ("VectorQuantize", {"rotation_trick": False}, rows),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}, rows),
    "projected": ("VectorQuantize", {"codebook_dim": 4}, rows),
    "heads": ("VectorQuantize", {"heads": 2, "codebook_dim": 4}, rows),
    "heads, own codebooks": ("VectorQuantize", {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, rows),
    "learnable": ("VectorQuantize", {"learnable_codebook": True, "ema_update": False}, rows),
    "orthogonal": ("VectorQuantize", {"orthogonal_reg_weight": 10.0, "orthogonal_reg_max_codes": 16}, rows),
    "images": ("VectorQuantize", {"accept_image_fmap": True}, image),
    "channels first": ("VectorQuantize", {"channel_last": False}, lambda: image().flatten(2)),
    "dead codes": ("VectorQuantize", {"threshold_ema_dead_code": 2}, rows),
    "k-means start": ("VectorQuantize", {"kmeans_init": True}, rows),
    "affine": ("VectorQuantize", {"affine_param": True, "sync_affine_param": False}, rows),
    "synchronous update": ("VectorQuantize", {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.1}, rows),
    "residual": ("ResidualVQ", {"num_quantizers": 3}, rows),
    "residual, shared": ("ResidualVQ", {"num_quantizers": 3, "shared_codebook": True}, rows),
    "residual, dropout": ("ResidualVQ", {"num_quantizers": 4, "quantize_dropout": True}, rows),
    "grouped": ("GroupedResidualVQ", {"num_quantizers": 2, "groups": 2}, rows),
    "SimVQ": ("SimVQ", {}, rows),
    "SimVQ, straight through": ("SimVQ", {"rotation_trick": False, "channel_first": True}, image),
    "residual SimVQ": ("ResidualSimVQ", {"num_quantizers": 2}, rows),
}


def lucidrains_pair(name):
    cls, options, batch = LUCIDRAINS[name]
    torch.manual_seed(0)
    plain = lucidrains(cls, dim=8, codebook_size=K, **options)
    if "k-means" not in name:
        # Freshly made codes lie so close together that the library's clamp at 1e-4 ties them.
        for module in plain.modules():
            if hasattr(module, "embed_avg"):
                codes = torch.randn_like(module.embed)
                codes = torch.nn.functional.normalize(codes, dim=-1) if module.use_cosine_sim else codes
                module.embed.data.copy_(codes)
                module.embed_avg.data.copy_(codes)
    converted = copy.deepcopy(plain)
    report = vqfast.convert(converted)
    assert report.replaced and not report.skipped, str(report)
    return converted, plain, batch


def batches(batch, steps=4):
    return [batch() + 0.1 * step for step in range(steps)]


@pytest.mark.parametrize("name", LUCIDRAINS)
def test_lucidrains_training(name):
    converted, plain, batch = lucidrains_pair(name)
    swaps.train_both(converted.train(), plain.train(), batches(batch))


@pytest.mark.parametrize("name", LUCIDRAINS)
def test_lucidrains_evaluation(name):
    converted, plain, batch = lucidrains_pair(name)
    if "k-means" in name or name == "affine":  # both need a first training batch
        for module in (converted, plain):
            torch.manual_seed(0)
            module.train()(batch())
    swaps.train_both(converted.eval(), plain.eval(), batches(batch, 2))


@pytest.mark.parametrize("name", ["plain", "cosine", "learnable", "residual", "SimVQ", "heads"])
def test_lucidrains_without_the_matrix(name):
    converted, plain, batch = lucidrains_pair(name)
    assert swaps.largest(lambda: plain(batch())) >= N * K
    assert swaps.largest(lambda: converted(batch())) <= N * K // 4


CALLS = {
    "indices": lambda m, z: m(z, indices=torch.arange(2 * SIDE * SIDE).view(2, -1) % K),
    "top k": lambda m, z: m(z, topk=3),
    "mask": lambda m, z: m(z, mask=torch.arange(2 * SIDE * SIDE).view(2, -1) % 3 > 0),
    "frozen": lambda m, z: m(z, freeze_codebook=True),
    "weighted": lambda m, z: m(z, ema_update_weight=torch.linspace(0, 1, K)),
    "weight by function": lambda m, z: m(z, ema_update_weight=lambda sums, counts: (counts > 1).float()),
    "held back, then used": lambda m, z: (m(z, accum_ema_update=True), m(z, accum_ema_update=True), m(z)),
    "known indices": lambda m, z: (m(z, ema_update=False), m.update_indices(z, torch.arange(2 * SIDE * SIDE).view(2, -1) % K)),
    "breakdown": lambda m, z: m(z, return_loss_breakdown=True),
}


@pytest.mark.parametrize("way", CALLS)
def test_lucidrains_calls(way):
    """indices= and topk= return what is made of all distances: they run as the library has them, in the same module."""
    converted, plain, batch = lucidrains_pair("plain")
    swaps.train_both(converted.train(), plain.train(), batches(batch, 2), call=CALLS[way])


@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_sample_codes": True},
        {"straight_through": True, "rotation_trick": False},
        {"codebook_diversity_loss_weight": 0.1},
        {"commitment_use_cross_entropy_loss": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_lucidrains_options_that_are_all_distances(options):
    report = vqfast.convert(lucidrains("VectorQuantize", dim=8, codebook_size=K, **options))
    assert not report.replaced and "N x K" in report.skipped[""]

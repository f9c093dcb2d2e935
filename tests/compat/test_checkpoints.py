"""Checkpoints of other libraries into our layers: same codes, same lookups, whatever the layout; no pickled code."""

import pickle

import cases
import pytest
import stand_ins
import swaps
import torch

from vqfast.compat import dac, encodec, rosinality, sonnet, taming
from vqfast.compat.checkpoints import load_quantizer
from vqfast.nn import ResidualVectorQuantizer, VectorQuantizer, VectorQuantizerEMA

D, K = 8, 32


def rows():
    return cases.normal(3, 20, D)


def image():
    return cases.normal(2, D, 5, 4)


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install {name})")


def lucidrains(cls="VectorQuantize", **options):
    return getattr(library("vector_quantize_pytorch"), cls)(dim=D, codebook_size=K, rotation_trick=False, **options)


def transformers(family, name):
    import importlib
    import types

    library("transformers")
    config = types.SimpleNamespace(
        codebook_size=K, codebook_dim=D, num_quantizers=3, frame_rate=75, hidden_size=D, vector_quantization_hidden_dimension=D
    )
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(config)


def image_codes(module):
    return module(image())[2][2].view(2, 5, 4)


# name: module, prefix, type of our layer, options of ours, (module, ours) -> what must be equal
SINGLE = {
    "rosinality": (lambda: rosinality.Quantize(D, K), VectorQuantizerEMA, {}, lambda m: m(rows())[2]),
    "taming": (lambda: taming.VectorQuantizer2(K, D, 0.25), VectorQuantizer, {"channel_dim": 1}, image_codes),
    "taming, moving average": (
        lambda: taming.EMAVectorQuantizer(K, D, 0.25),
        VectorQuantizerEMA,
        {"channel_dim": 1},
        image_codes,
    ),
    "encodec codebook": (
        lambda: encodec.VectorQuantization(D, K, kmeans_init=False),
        VectorQuantizerEMA,
        {},
        lambda m: m.encode(rows().transpose(1, 2)),
    ),
    "encodec, projected": (
        lambda: encodec.VectorQuantization(D, K, codebook_dim=4, kmeans_init=False),
        VectorQuantizerEMA,
        {},
        lambda m: m.encode(rows().transpose(1, 2)),
    ),
    "Sonnet": (lambda: sonnet.VectorQuantizer(D, K, 0.25), VectorQuantizer, {}, lambda m: m(rows(), False)["encoding_indices"]),
    "Sonnet, moving average": (
        lambda: sonnet.VectorQuantizerEMA(D, K, 0.25, 0.9),
        VectorQuantizerEMA,
        {},
        lambda m: m(rows(), False)["encoding_indices"],
    ),
    "lucidrains": (lucidrains, VectorQuantizerEMA, {}, lambda m: m(rows())[1]),
    "lucidrains, projected": (lambda: lucidrains(codebook_dim=4), VectorQuantizerEMA, {}, lambda m: m(rows())[1]),
    "lucidrains, cosine": (
        lambda: lucidrains(use_cosine_sim=True),
        VectorQuantizerEMA,
        {"metric": "cosine"},
        lambda m: m(rows())[1],
    ),
    "lucidrains, heads": (
        lambda: lucidrains(heads=2, codebook_dim=4, separate_codebook_per_head=True),
        VectorQuantizerEMA,
        {},
        lambda m: m(rows())[1].transpose(1, 2),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_quantizers(name):
    build, kind, options, codes_of = SINGLE[name]
    torch.manual_seed(0)
    module = swaps.randomise(build()).eval()
    if "cosine" in name:
        module._codebook.embed.copy_(torch.nn.functional.normalize(module._codebook.embed, dim=-1))
    state = {f"model.quantize.{key}": value for key, value in module.state_dict().items()}
    state["model.encoder.weight"] = torch.zeros(3)
    layer = load_quantizer(state, prefix="model.quantize", **options).eval()
    assert type(layer) is kind
    z = image() if options.get("channel_dim") == 1 else rows()
    with torch.no_grad():
        assert torch.equal(layer.encode(z), codes_of(module))


@pytest.mark.parametrize("name", ["rosinality", "lucidrains", "encodec codebook", "taming, moving average"])
def test_training_goes_on_without_a_jump(name):
    """A step without rows for most codes leaves those codes where the checkpoint has them."""
    build, _, options, _ = SINGLE[name]
    layer = load_quantizer(swaps.randomise(build()).state_dict(), **options).train()
    before = layer.codebook.clone()
    z = before[:1, :, None, None] if options.get("channel_dim") == 1 else before[:1]
    layer(z)
    torch.testing.assert_close(layer.codebook, before, rtol=1e-5, atol=1e-6)


STACKS = {
    "lucidrains": (lambda: lucidrains("ResidualVQ", num_quantizers=3), "", lambda m: m(rows())[1]),
    "encodec": (
        lambda: encodec.ResidualVectorQuantizer(dimension=D, n_q=3, bins=K, kmeans_init=False),
        "vq",
        lambda m: m.encode(rows().transpose(1, 2), 75).movedim(0, -1),
    ),
    "transformers' Encodec": (
        lambda: transformers("encodec", "EncodecResidualVectorQuantizer"),
        "",
        lambda m: m.encode(rows().transpose(1, 2)).movedim(0, -1),
    ),
    "transformers' Mimi": (
        lambda: transformers("mimi", "MimiResidualVectorQuantizer"),
        "",
        lambda m: m.encode(rows().transpose(1, 2)).movedim(0, -1),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_become_residual_quantizers(name):
    build, prefix, codes_of = STACKS[name]
    torch.manual_seed(0)
    module = swaps.randomise(build()).eval()
    layer = load_quantizer(module.state_dict(), prefix=prefix).eval()
    assert type(layer) is ResidualVectorQuantizer and layer.num_quantizers == 3
    with torch.no_grad():
        assert torch.equal(layer.encode(rows()), codes_of(module))


def test_moshi_under_both_of_its_names():
    module = swaps.randomise(stand_ins.MoshiCodebook(D, K))
    for sums in ("embedding_sum", "embed_sum"):
        state = {"_codebook.cluster_usage": module.cluster_usage, f"_codebook.{sums}": module.embedding_sum}
        assert torch.equal(load_quantizer(state).codebook, module.embedding)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "wrapped.ckpt"])
def test_files(tmp_path, name):
    state, path = rosinality.Quantize(D, K).state_dict(), tmp_path / name
    if name == "model.safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in name else state, path)
    assert torch.equal(load_quantizer(path).codebook, state["embed"].T)


def test_pickled_code_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    with open(tmp_path / "model.pt", "wb") as file:
        pickle.dump({"embed": Bomb()}, file)
    torch.save({"embed": Bomb()}, tmp_path / "zipped.pt")
    for name in ("model.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint: Weights only"):
            load_quantizer(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_square_codebooks_need_a_word():
    state = rosinality.Quantize(D, D).state_dict()
    with pytest.raises(ValueError, match="transposed"):
        load_quantizer(state)
    assert torch.equal(load_quantizer(state, transposed=True).codebook, state["embed"].T)
    assert torch.equal(load_quantizer(state, transposed=False).codebook, state["embed"])


def test_square_embeddings_keep_their_own_layout():
    """Without sizes the key tells: rows under embedding.weight, columns under Sonnet's embeddings."""
    weight = cases.normal(D, D)
    assert torch.equal(load_quantizer({"embedding.weight": weight}).codebook, weight)
    assert torch.equal(load_quantizer({"embeddings": weight}).codebook, weight.T)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_quantizer(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="no key starts with 'vq.'"):
        load_quantizer({"quantize.embed": torch.zeros(2, 3)}, prefix="vq")
    with pytest.raises(ValueError, match="weight"):
        load_quantizer({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="vqfast.compat.dac"):
        load_quantizer(dac.VectorQuantize(16, K, 4).state_dict())
    levels = [encodec.VectorQuantization(D, size, kmeans_init=False).state_dict() for size in (K, 2 * K)]
    state = {f"layers.{i}.{key}": value for i, level in enumerate(levels) for key, value in level.items()}
    with pytest.raises(ValueError, match="one by one"):
        load_quantizer(state)
    assert load_quantizer(state, prefix="layers.1").codebook.shape == (2 * K, D)
    with pytest.raises(ValueError, match="layer norm"):
        load_quantizer(lucidrains(codebook_dim=4, layernorm_after_project_in=True).state_dict())
    with pytest.raises(ValueError, match="heads that share a codebook"):
        load_quantizer(lucidrains(codebook_dim=3, heads=2).state_dict())
    with pytest.raises(ValueError, match="is a folder"):
        load_quantizer(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_quantizer(tmp_path / "list.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_quantizer(tmp_path / name)


def test_float64_stays():
    state = {"embedding.weight": cases.normal(K, D).double()}
    layer = load_quantizer(state)
    assert layer.codebook.dtype == torch.float64 and torch.equal(layer.codebook, state["embedding.weight"])

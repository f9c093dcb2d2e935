"""What projects take from vector_quantize_pytorch beside its layers: helper functions of its modules, the inner codebook, reprs."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from side_by_side import Fresh, assert_equal, libraries, pair, tensors
from torch import nn

MODULES = (
    "binary_mapper evo_lookup_free_quantization finite_scalar_perturbation finite_scalar_quantization hierarchical_vq"
    " latent_quantization lookup_free_quantization random_projection_quantizer residual_fsq residual_lfq residual_sim_vq residual_vq"
    " sim_vq utils vector_quantize_pytorch"
).split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def modules(name):
    return [importlib.import_module(f"{library.__name__}.{name}") for library in libraries()]


def own_names(module):
    """Public functions, classes and constants that the other library's module defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and ((name.isupper() and not inspect.ismodule(value)) or str(getattr(value, "__module__", "")).startswith("vector_quantize_pytorch"))
    ]


def test_every_module_is_known_here():
    peer, _ = libraries()
    assert sorted(module.name for module in pkgutil.iter_modules(peer.__path__)) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_what_its_namesake_has(name):
    peer, face = modules(name)
    assert [missing for missing in own_names(peer) if not hasattr(face, missing)] == []
    for function in own_names(peer):
        theirs, own = getattr(peer, function), getattr(face, function)
        if inspect.isfunction(theirs):
            kinds = [[p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty] for f in (theirs, own)]
            assert len(kinds[0]) == len(kinds[1]), function
            options = [[p.name for p in inspect.signature(f).parameters.values() if p.default is not p.empty] for f in (theirs, own)]
            assert options[0] == options[1][: len(options[0])], function


LOGITS = torch.linspace(-3, 3, 24).sin().reshape(2, 3, 4)
MAIN, RESIDUAL = "vector_quantize_pytorch", "residual_vq"
# module, function, arguments; what draws numbers runs from one seed.
CALLS = {
    "exists": (MAIN, "exists", (None,)),
    "default": (MAIN, "default", (None, 3)),
    "default of FSQ": ("finite_scalar_quantization", "default", (None, None, 0, 2)),
    "default of LFQ": ("lookup_free_quantization", "default", (None, lambda: 5)),
    "at most one": (MAIN, "at_most_one_of", (True, 0, 1)),
    "is empty": (MAIN, "is_empty", (torch.zeros(2, 0),)),
    "l2norm": (MAIN, "l2norm", (LOGITS,)),
    "safe_div": (MAIN, "safe_div", (LOGITS, LOGITS.abs())),
    "append dims": (MAIN, "append_dims_to", (LOGITS[0, 0], 3)),
    "no module": (MAIN, "Sequential", (None,)),
    "cdist": (MAIN, "cdist", (LOGITS, LOGITS + 1)),
    "log": (MAIN, "log", (torch.tensor([0.0, 1.0]),)),
    "log of LFQ": ("lookup_free_quantization", "log", (torch.tensor([0.0, 1.0]),)),
    "entropy": (MAIN, "entropy", (LOGITS.softmax(-1),)),
    "lens": (MAIN, "lens_to_mask", (torch.tensor([0, 2, 5]), 4)),
    "init": (MAIN, "uniform_init", (3, 4, 5)),
    "noise": (MAIN, "gumbel_noise", (LOGITS,)),
    "sample, largest": (MAIN, "gumbel_sample", (LOGITS,)),
    "sample, drawn": (MAIN, "gumbel_sample", (LOGITS, 0.5, True)),
    "sample, best two": (MAIN, "gumbel_sample", (LOGITS, 1.0, False, False, -1, True, 2)),
    "smoothing": (MAIN, "laplace_smoothing", (LOGITS.abs(), 4)),
    "few samples": (MAIN, "sample_vectors", (LOGITS[0], 5)),
    "samples": (MAIN, "batched_sample_vectors", (LOGITS, 2)),
    "pad shape": (MAIN, "pad_shape", ((2, 3, 4), 7, 1)),
    "bins": (MAIN, "batched_bincount", (torch.tensor([[0, 2, 2], [1, 1, 1]]),), {"minlength": 4}),
    "k-means": (MAIN, "kmeans", (torch.linspace(0, 40, 200).sin().reshape(1, 50, 4), 5)),
    "k-means, cosine": (MAIN, "kmeans", (torch.linspace(0, 40, 200).sin().reshape(1, 50, 4), 5, 3, True)),
    "rotation": (MAIN, "efficient_rotation_trick_transform", (*nn.functional.normalize(LOGITS[:, :2], dim=-1), LOGITS[0, :2])),
    "rotate": (MAIN, "rotate_to", (LOGITS, LOGITS + 1)),
    "straight through": (MAIN, "straight_through", (LOGITS, LOGITS + 1)),
    "directional": (MAIN, "directional_reparam", (LOGITS, LOGITS + 1)),
    "orthogonal": (MAIN, "orthogonal_loss_fn", (LOGITS,)),
    "several processes": (MAIN, "is_distributed", ()),
    "multiple": (RESIDUAL, "round_up_multiple", (5, 4)),
    "tuple": (RESIDUAL, "cast_tuple", (2, 3)),
    "unique": (RESIDUAL, "unique", ([2, 2, 2],)),
    "fraction of the gradient": (RESIDUAL, "frac_gradient", (LOGITS, 0.3)),
    "pad": (RESIDUAL, "pad_at_dim", (LOGITS, (1, 2)), {"dim": -2, "value": 3.0}),
    "select": (RESIDUAL, "batch_select", (LOGITS[0], torch.tensor([[0, 2], [1, 1], [3, 0]]))),
    "select, pattern": (RESIDUAL, "batch_select", (LOGITS, torch.tensor([[[0, 2]], [[1, 1]]])[:, 0], "* k d")),
    "seed": (RESIDUAL, "get_maybe_sync_seed", (torch.device("cpu"),)),
    "level shape": ("hierarchical_vq", "to_level_shape", (3, 2)),
    "mean over processes": ("lookup_free_quantization", "maybe_distributed_mean", (LOGITS,)),
}


@pytest.mark.parametrize("case", CALLS)
def test_helpers_return_what_the_other_library_s_return(case):
    where, name, args, *rest = CALLS[case]
    results = []
    for module in modules(where):
        torch.manual_seed(1)
        results.append(getattr(module, name)(*args, **(rest[0] if rest else {})))
    theirs, own = results
    assert type(own) is type(theirs)
    for a, b in zip(tensors(own), tensors(theirs), strict=True):
        assert_equal(a, b, case)
    if not tensors(theirs):
        assert own == theirs


def test_packing_and_averages():
    peer, face = modules(MAIN)
    peer_fsq, face_fsq = modules("finite_scalar_quantization")
    x, results = torch.randn(2, 3, 4, 5), []
    for module, scalar in ((peer, peer_fsq), (face, face_fsq)):
        packed, inverse = module.pack_one(x, "b * d")
        rows, shapes = scalar.pack_one(x, "* d")
        old, grads = torch.ones(1, 3), torch.ones(1, 3)
        module.accum_grad_(old, grads * 2)
        module.accum_grad_(old, grads)
        module.ema_inplace(old, grads * 4, 0.5, torch.tensor([0.0, 1.0, 0.5]))
        assert old.grad is None and scalar.maybe(lambda t: t + 1)(None) is None
        results.append((packed, inverse(packed), inverse(packed[..., 0], "b *"), rows, scalar.unpack_one(rows, shapes, "* d"), old))
    for theirs, own in zip(*results, strict=True):
        assert_equal(own, theirs, "packed")


def test_multinomial_counts():
    _, face = modules(MAIN)
    counts = face.sample_multinomial(100, torch.tensor([0.2, 0.8, 0.0]))
    assert counts.sum() == 100 and counts[2] == 0 and counts[1] > counts[0]


def test_a_project_that_cannot_be_edited():
    """The documented lines put the face in the other library's place, submodules included."""
    text = (Path(__file__).parents[2] / "docs" / "COMPAT.md").read_text()
    lines = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "sys.modules" in block)
    lines += """
import vector_quantize_pytorch as package
from vector_quantize_pytorch import ResidualVQ, VectorQuantize
from vector_quantize_pytorch.residual_vq import GroupedResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook, gumbel_sample
assert VectorQuantize.__module__.startswith("vqfast.") and package.residual_vq.ResidualVQ is ResidualVQ
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", lines], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# ---- the inner codebook --------------------------------------------------------------------------------------------------------

BOOK = {"dim": 6, "codebook_size": 16}
ROWS, STACKED = (2, 30, 6), (2, 3, 30, 6)
MASK = torch.arange(60).view(2, 30) % 3 > 0
FORWARD = {
    "default": ({}, ROWS, {}),
    "two codebooks": ({"num_codebooks": 2}, STACKED, {}),
    "frozen": ({}, ROWS, {"freeze_codebook": True}),
    "no update": ({}, ROWS, {"update_usage": False}),
    "mask": ({}, ROWS, {"mask": MASK}),
    "mask over heads": ({}, (1, 6, 30, 6), {"mask": MASK}),
    "k nearest": ({}, ROWS, {"topk": 3}),
    "weights": ({}, ROWS, {"ema_update_weight": torch.linspace(0, 1, 16)}),
    "no averages": ({"threshold_ema_dead_code": 0}, ROWS, {"ema_update": False}),
    "temperature": ({"gumbel_sample": Fresh("stochastic")}, ROWS, {"sample_codebook_temp": 0.5}),
    "transform": ({}, ROWS, {"codebook_transform_fn": lambda codes: codes[:, None, None] + torch.linspace(0, 1, 60).reshape(1, 2, 30, 1, 1)}),
}  # fmt: skip


def books(**kwargs):
    peer, face = modules(MAIN)
    made = []
    for module in (peer, face):
        torch.manual_seed(3)
        own = {key: partial(module.gumbel_sample, stochastic=True) if isinstance(value, Fresh) else value for key, value in kwargs.items()}
        made.append(module.Codebook(**BOOK, **own))
    made[1].load_state_dict(made[0].state_dict(), strict=True)
    return made


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", FORWARD)
def test_the_codebook_s_own_forward(case, train):
    kwargs, shape, call = FORWARD[case]
    peer, ours = books(**kwargs)
    x = torch.randn(shape)
    results = []
    for book in (peer, ours):
        torch.manual_seed(4)
        results.append(book.train(train)(x, **call))
    keep = call.get("mask", torch.ones(shape[:-1], dtype=torch.bool))
    keep = (keep.repeat_interleave(3, 0) if case == "mask over heads" else keep).flatten()
    for theirs, own in zip(*results, strict=True):
        assert own.shape == theirs.shape
        assert_equal(own.reshape(len(keep), -1)[keep], theirs.reshape(len(keep), -1)[keep], case)  # a masked row has no code here
    for name, value in peer.state_dict().items():
        assert_equal(ours.state_dict()[name], value, name)


def test_a_codebook_learns_from_indices_and_one_hot_rows():
    for method in ("update_indices", "update_ema_indices", "update_codebook"):
        peer, ours = books()
        x, indices = torch.randn(ROWS), torch.randint(0, 16, ROWS[:2])
        for book in (peer, ours):
            torch.manual_seed(5)
            if method == "update_codebook":
                one_hot = nn.functional.one_hot(indices.reshape(1, -1), 16).float()
                book.update_codebook(x.reshape(1, -1, 6), one_hot, mask=MASK.reshape(1, -1))
            else:
                getattr(book, method)(x, indices, mask=MASK)
        for name, value in peer.state_dict().items():
            assert_equal(ours.state_dict()[name], value, name)


@pytest.mark.parametrize("mask", [None, MASK.reshape(1, -1)], ids=["all", "mask"])
def test_codes_can_be_replaced(mask):
    peer, ours = books()
    x, dead = torch.randn(1, 60, 6), torch.arange(16)[None] % 3 == 0
    for book in (peer, ours):
        torch.manual_seed(5)
        book.replace(x, dead, mask)
    for name, value in peer.state_dict().items():
        assert_equal(ours.state_dict()[name], value, name)


def test_only_the_library_s_own_sampler_is_taken():
    _, face = modules(MAIN)
    with pytest.raises(ValueError, match="gumbel_sample"):
        face.Codebook(**BOOK, gumbel_sample=lambda logits, **kwargs: None)


# ---- what a layer shows --------------------------------------------------------------------------------------------------------

SHOWN = {
    "VectorQuantize": {"dim": 8, "codebook_size": 16, "codebook_dim": 4, "heads": 2, "layernorm_after_project_in": True},
    "ResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2, "codebook_dim": 4},
    "GroupedResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2, "groups": 2},
    "SimVQ": {"dim": 8, "codebook_size": 16},
    "ResidualSimVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
    "RandomProjectionQuantizer": {"dim": 8, "codebook_size": 16, "codebook_dim": 4},
    "FSQ": {"levels": [5, 5], "dim": 4},
    "FSP": {"levels": [5, 5], "dim": 4},
    "LFQ": {"dim": 4},
    "ResidualFSQ": {"levels": [5, 5], "num_quantizers": 2},
    "GroupedResidualFSQ": {"dim": 4, "groups": 2, "levels": [5, 5], "num_quantizers": 2},
    "ResidualLFQ": {"dim": 4, "codebook_size": 16, "num_quantizers": 2},
    "GroupedResidualLFQ": {"dim": 8, "groups": 2, "codebook_size": 16, "num_quantizers": 2},
    "LatentQuantize": {"levels": [5, 5], "dim": 4},
    "BinaryMapper": {"bits": 3},
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_layer_prints_as_its_namesake_and_has_its_buffers(name):
    peer, ours = pair(name, **SHOWN[name])
    assert repr(ours) == repr(peer)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in peer.named_parameters()]
    buffers = dict(ours.named_buffers())
    for key, value in peer.named_buffers():
        assert_equal(buffers[key], value, key)

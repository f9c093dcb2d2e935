"""vqfast.convert on stand-ins for projects outside the registries: same results, no N x K, and undone by revert()."""

import copy
import io
import pickle

import cases
import pytest
import stand_ins
import swaps
import torch
from torch import nn

import vqfast

D, K, SIDE = 8, 256, 16  # 2 x 16 x 16 rows: N x K is far larger than anything else that a step makes
N = 2 * SIDE * SIDE


def images(steps=3, channels=D):
    return [cases.normal(2, channels, SIDE, SIDE, seed=step) for step in range(steps)]


def rows(steps=3):
    return [cases.normal(2, SIDE * SIDE, D, seed=step) for step in range(steps)]


MODULES = {
    "rosinality": (lambda: stand_ins.Quantize(D, K), rows),
    "taming": (lambda: stand_ins.VectorQuantizer2(K, D, 0.25), images),
    "taming, not legacy, shaped": (
        lambda: stand_ins.VectorQuantizer2(K, D, 0.25, legacy=False, sane_index_shape=True),
        images,
    ),
    "encodec": (lambda: stand_ins.EuclideanCodebook(D, K), rows),
    "encodec, k-means start": (lambda: stand_ins.EuclideanCodebook(D, 32, kmeans_init=True), rows),
    "audiocraft": (lambda: stand_ins.AudiocraftCodebook(D, K, decay=0.8), rows),
    "moshi": (lambda: stand_ins.MoshiCodebook(D, K), rows),
    "dac": (lambda: stand_ins.VectorQuantize(16, K, D), lambda steps=3: [b.flatten(2) for b in images(steps, 16)]),
    "LlamaGen": (lambda: stand_ins.LlamaGenQuantizer(K, D, 0.25, 0.0, True, True), images),
    "LlamaGen, not normalised": (lambda: stand_ins.LlamaGenQuantizer(K, D, 0.25, 0.0, False, False), images),
    "TiTok": (lambda: stand_ins.TiTokQuantizer(K, D), images),
    "TiTok, normalised": (lambda: stand_ins.TiTokQuantizer(K, D, use_l2_norm=True), images),
    "VAR": (lambda: stand_ins.VARQuantizer(K, D, False, v_patch_nums=(1, 2, 4, SIDE)), images),
    "VAR, normalised": (lambda: stand_ins.VARQuantizer(K, D, True, v_patch_nums=(1, 2, 4, SIDE)), images),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)


def pair(name):
    """(converted, as it is, batches), with the same random codes."""
    build, batches = MODULES[name]
    torch.manual_seed(0)
    plain, converted = build(), build()
    if "k-means" not in name:
        swaps.randomise(plain)
    converted.load_state_dict(plain.state_dict())
    report = vqfast.convert(converted)
    assert list(report.replaced) == [""] and not report.skipped, str(report)
    return converted, plain, batches()


@EVERY_MODULE
def test_training_agrees_step_by_step(name):
    converted, plain, batches = pair(name)
    swaps.train_both(converted.train(), plain.train(), batches)


@EVERY_MODULE
def test_evaluation_agrees(name):
    converted, plain, batches = pair(name)
    if "k-means" in name:
        converted(batches[0]), plain(batches[0])
        plain.load_state_dict(converted.state_dict())
    swaps.train_both(converted.eval(), plain.eval(), batches)


@EVERY_MODULE
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_matrix_of_rows_by_codes(name, training):
    converted, plain, batches = pair(name)
    codes = 32 if "k-means" in name else K
    matrix = N * codes
    for module in (plain, converted):
        module.train(training)
    assert swaps.largest(lambda: plain(batches[0])) >= matrix, "the stand-in itself should need it, or this test sees nothing"
    others = 65536 + N if name == "LlamaGen" else 0  # its record of recent indices, and the new ones
    assert swaps.largest(lambda: converted(batches[0])) <= max(matrix // 4, others)


@EVERY_MODULE
def test_names_state_and_identity_stay(name):
    converted, plain, _ = pair(name)
    assert isinstance(converted, type(plain)) and type(converted).__name__ == type(plain).__name__
    assert list(converted.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(converted.state_dict(), strict=True)
    assert repr(converted) == repr(plain)


def test_parameters_buffers_and_hooks_are_the_same_objects():
    module = stand_ins.VectorQuantizer2(K, D, 0.25)
    weight, calls = module.embedding.weight, []
    module.register_forward_hook(lambda *_: calls.append("module"))
    module.embedding.register_forward_hook(lambda *_: calls.append("embedding"))
    vqfast.convert(module)
    assert not calls, "trying a copy must not call the model's hooks on the model"
    module(images(1)[0])
    assert module.embedding.weight is weight and calls == ["embedding", "module"]


def test_revert_gives_back_the_class():
    model = nn.Sequential(stand_ins.VectorQuantizer2(K, D, 0.25), nn.Identity())
    own = type(model[0])
    report = vqfast.convert(model)
    assert type(model[0]) is not own
    report.revert()
    assert type(model[0]) is own
    assert list(vqfast.convert(model).replaced) == ["0"]


def test_converting_twice_is_harmless():
    model = nn.Sequential(stand_ins.Quantize(D, K))
    first, second = vqfast.convert(model), vqfast.convert(model)
    assert not second.replaced and "already" in second.skipped["0"]
    second.revert()
    assert "already" in vqfast.convert(model).skipped["0"], "an empty report must not undo another's work"
    first.revert()
    assert type(model[0]) is stand_ins.Quantize


def test_unknown_models_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 2))
    report = vqfast.convert(model)
    assert not report.replaced and not report.skipped and "nothing was changed" in str(report)


def test_faces_of_our_own_need_no_conversion():
    from vqfast.compat import taming
    from vqfast.compat import vector_quantize_pytorch as faces

    model = nn.ModuleList([faces.VectorQuantize(D, K), faces.SimVQ(D, K), taming.VectorQuantizer2(K, D, 0.25)])
    report = vqfast.convert(model)
    assert not report.replaced and not report.skipped, str(report)


def test_what_is_n_by_k_itself_is_refused_with_the_reason():
    model = nn.ModuleDict(
        {
            "one hot": stand_ins.VectorQuantizer(K, D, 0.25),
            "entropy": stand_ins.LlamaGenQuantizer(K, D, 0.25, 0.1, True, False),
            "clustering": stand_ins.TiTokQuantizer(K, D, clustering_vq=True),
        }
    )
    report = vqfast.convert(model)
    assert not report.replaced and set(report.skipped) == {"one hot", "entropy", "clustering"}
    assert all("N x K" in reason for reason in report.skipped.values()), str(report)


def impostor(name, **methods):
    """A class that a project could have made of rosinality's: same name, other behaviour."""
    cls = type("Quantize", (stand_ins.Quantize,), methods)
    cls.__module__, cls.__qualname__ = "vqvae", "Quantize"
    return cls


def test_a_class_that_behaves_otherwise_is_left_alone():
    """The same name and arguments, another rule: only a trial can tell."""

    def forward(self, input):
        quantized, diff, found = stand_ins.Quantize.forward(self, input)
        return quantized, 2 * diff, found

    report = vqfast.convert(impostor("doubled", forward=forward)(D, K))
    assert "not those of the class" in report.skipped[""], str(report)


def test_another_update_is_noticed():
    """Equal outputs, but codes move otherwise in training."""

    def forward(self, input):
        out = stand_ins.Quantize.forward(self, input)
        if self.training:
            self.cluster_size.mul_(0.5)
        return out

    report = vqfast.convert(impostor("decaying", forward=forward)(D, K))
    assert "in training" in report.skipped[""], str(report)


def test_another_gradient_is_noticed():
    def forward(self, input):
        quantized, diff, found = stand_ins.Quantize.forward(self, input)
        return quantized.detach() + 2 * (input - input.detach()), diff, found

    report = vqfast.convert(impostor("louder", forward=forward)(D, K))
    assert "evaluation" in report.skipped[""], str(report)


def test_new_arguments_are_noticed():
    def forward(self, input, temperature=1.0):
        return stand_ins.Quantize.forward(self, input)

    report = vqfast.convert(impostor("tempered", forward=forward)(D, K))
    assert "temperature" in report.skipped[""], str(report)


def test_a_subclass_that_overrides_is_left_alone():
    class Mine(stand_ins.Quantize):
        def forward(self, input):
            return super().forward(input)

    class Plain(stand_ins.Quantize):
        pass

    model = nn.ModuleList([Mine(D, K), Plain(D, K)])
    report = vqfast.convert(model)
    assert list(report.replaced) == ["1"] and "of its own" in report.skipped["0"], str(report)


def test_an_instance_that_was_wrapped_is_left_alone():
    module = stand_ins.Quantize(D, K)
    module.forward = module.forward
    assert "wrapped" in vqfast.convert(module).skipped[""]


def test_a_copy_of_a_library_inside_a_package_is_known():
    cls = type("VectorQuantizer2", (stand_ins.VectorQuantizer2,), {})
    cls.__module__, cls.__qualname__ = "project.third_party.taming.modules.vqvae.quantize", "VectorQuantizer2"
    assert vqfast.convert(cls(K, D, 0.25)).replaced


def test_the_trial_leaves_state_and_random_numbers_alone():
    model = nn.ModuleList([build() for build, _ in MODULES.values()])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    vqfast.convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_converting_where_no_gradients_are_taken(mode):
    with mode():
        report = vqfast.convert(nn.ModuleList([stand_ins.Quantize(D, K), stand_ins.VectorQuantizer2(K, D, 0.25)]))
    assert len(report.replaced) == 2, str(report)


def test_copies_and_pickles_stay_converted():
    """By copy.deepcopy and by pickle, for stand-ins that a module of their name holds."""
    module = stand_ins.Quantize(D, K).eval()
    vqfast.convert(module)
    z = rows(1)[0]
    twin = copy.deepcopy(module)
    assert type(twin) is type(module) and not vqfast.convert(twin).replaced
    swaps.close(twin(z), module(z))


def test_pickles_name_the_library(monkeypatch):
    import sys
    import types

    library = types.ModuleType("vqvae")
    library.Quantize = stand_ins.Quantize
    monkeypatch.setitem(sys.modules, "vqvae", library)
    module = stand_ins.Quantize(D, K).eval()
    vqfast.convert(module)
    buffer = io.BytesIO()
    pickle.dump(module, buffer)
    buffer.seek(0)
    again = pickle.load(buffer)
    assert type(again) is type(module)
    swaps.close(again(rows(1)[0]), module(rows(1)[0]))


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        vqfast.convert([stand_ins.Quantize(D, K)])


def test_codes_are_right_where_the_expanded_formula_is_not():
    """At an offset of 1,000 the peer's |x|^2 - 2 x.c + |c|^2 loses the distances in float32; float64 tells who is right."""
    torch.manual_seed(0)
    plain = stand_ins.EuclideanCodebook(D, K).eval()
    plain.embed.copy_(cases.normal(K, D) + 1000)
    converted = swaps.twin(plain)
    vqfast.convert(converted)
    z = cases.normal(N, D, seed=1) + 1000
    truth = torch.cdist(z.double(), plain.embed.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    wrong = {name: (module.encode(z) != truth).sum().item() for name, module in (("plain", plain), ("converted", converted))}
    assert wrong["converted"] == 0 and wrong["plain"] > N // 4, wrong

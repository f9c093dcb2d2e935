"""Faces and converted quantizers inside torch.compile(fullgraph=True), torch.export, ONNX, autocast and checkpointing."""

import copy

import cases
import pytest
import stand_ins
import swaps
import torch
from torch.utils.checkpoint import checkpoint

import vqfast
from vqfast.compat import dac, rosinality, taming

D, K = 8, 32


def converted(module):
    assert vqfast.convert(module).replaced
    return module


def image():
    return cases.normal(2, D, 6, 5)


MODULES = {
    "rosinality": (lambda: rosinality.Quantize(D, K), lambda: image().movedim(1, -1)),
    "taming": (lambda: taming.VectorQuantizer2(K, D, 0.25), image),
    "taming, moving average": (lambda: taming.EMAVectorQuantizer(K, D, 0.25), image),
    "dac": (lambda: dac.VectorQuantize(D, K, 4), lambda: image().flatten(2)),
    "rosinality, converted": (lambda: converted(stand_ins.Quantize(D, K)), lambda: image().movedim(1, -1)),
    "taming, converted": (lambda: converted(stand_ins.VectorQuantizer2(K, D, 0.25)), image),
    "LlamaGen, converted": (lambda: converted(stand_ins.LlamaGenQuantizer(K, D, 0.25, 0.0, True, False)), image),
    "VAR, converted": (lambda: converted(stand_ins.VARQuantizer(K, D, False, v_patch_nums=(1, 2, 4))), lambda: cases.normal(2, D, 4, 4)),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)


def make(name):
    build, batch = MODULES[name]
    torch.manual_seed(0)
    return swaps.randomise(build()), batch()


@EVERY_MODULE
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_whole(name, training):
    """One graph, the eager results, gradients and state."""
    eager, z = make(name)
    traced = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    swaps.train_both(traced.train(training), eager.train(training), [z, z + 1], call=lambda m, z: (compiled if m is traced else m)(z))


@EVERY_MODULE
def test_exported(name):
    module, z = make(name)
    program = torch.export.export(module.eval(), (z,))
    swaps.close(program.module()(z), module(z))


def integers(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and not t.is_floating_point()]


# Not dac, whose projection runs in bfloat16 under autocast and hands on other rows; VAR's forward returns no codes.
@pytest.mark.parametrize("name", [name for name in MODULES if name.split(",")[0] not in ("dac", "VAR")])
def test_autocast_changes_no_code(name):
    module, z = make(name)
    codes = integers(module.eval()(z))
    with torch.autocast("cpu", torch.bfloat16):
        again = integers(module(z))
    assert len(codes) == len(again) == 1 and torch.equal(codes[0], again[0])


@pytest.mark.parametrize("name", ["taming", "dac", "taming, converted"])
def test_checkpointing_gives_the_same_gradients(name):
    """Quantizers whose codebook learns by gradient can be recomputed: their forward changes nothing."""
    plain, z = make(name)
    again = copy.deepcopy(plain)
    swaps.train_both(again, plain, [z], call=lambda m, z: checkpoint(m, z, use_reentrant=False) if m is again else m(z))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_converted_quantizer_goes_to_onnx(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install onnx onnxscript onnxruntime)")
    import onnxruntime

    from vqfast.compat.onnx import translations

    module, z = make("taming, converted")
    program = torch.onnx.export(module.eval(), (z,), dynamo=True, custom_translation_table=translations(), verbose=False)
    program.save(tmp_path / "quantizer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "quantizer.onnx")
    outputs = session.run(None, {session.get_inputs()[0].name: z.numpy()})
    quantized, loss, (_, _, indices) = module(z)
    assert torch.equal(torch.from_numpy(outputs[-1]), indices)
    torch.testing.assert_close(torch.from_numpy(outputs[0]), quantized, rtol=1e-5, atol=1e-6)

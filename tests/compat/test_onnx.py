"""ONNX export of evaluation graphs through standard operators: same codes in onnxruntime, and no operator of ours in the file."""

import math

import cases
import pytest
import torch

import vqfast.compat.vector_quantize_pytorch as face
from vqfast.nn import ResidualVectorQuantizer, VectorQuantizer, VectorQuantizerEMA

onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install onnx onnxscript onnxruntime)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install onnx onnxscript onnxruntime)")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install onnx onnxscript onnxruntime)")

from vqfast.compat.onnx import translations  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
D, K = 6, 40


class Encoder(torch.nn.Module):
    """A convolution and a quantizer; what a tokenizer deploys."""

    def __init__(self, quantizer):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.quantizer = torch.nn.Conv2d(3, D, 3, padding=1), quantizer


class Whole(Encoder):
    def forward(self, x):
        out = self.quantizer(self.convolution(x))
        return out.quantized, out.indices, out.loss, out.perplexity, out.usage, out.nonfinite


class Masked(Encoder):
    def forward(self, x, mask):
        out = self.quantizer(self.convolution(x), mask)
        return out.quantized, out.indices, out.loss, out.perplexity, out.usage, out.nonfinite


class Codec(Encoder):
    def forward(self, x):
        indices = self.quantizer.encode(self.convolution(x))
        return indices, self.quantizer.decode(indices)


def exported(model, inputs, path):
    program = torch.onnx.export(model, inputs, dynamo=True, custom_translation_table=translations(), verbose=False)
    program.save(path)
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert not any("vqfast" in node.domain or "vqfast" in node.op_type for node in file.graph.node)
    return runtime.InferenceSession(path)


def agree(model, inputs, path, others=()):
    session = exported(model, inputs, path)
    for case in (inputs, *others):
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, case)})
        with torch.no_grad():
            wanted = model(*case)
        for a, b in zip(got, wanted, strict=True):
            a = torch.from_numpy(a)
            assert a.dtype == b.dtype and a.shape == b.shape
            tolerance = 0 if b.dtype == torch.int64 else 1e-4
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


LAYERS = {
    "parameter": lambda: VectorQuantizer(D, K, channel_dim=1),
    "moving average": lambda: VectorQuantizerEMA(D, K, channel_dim=1),
    "cosine, groups": lambda: VectorQuantizerEMA(D, K, channel_dim=1, metric="cosine", groups=2),
    "dot": lambda: VectorQuantizerEMA(D, K, channel_dim=1, metric="dot"),
    "projected": lambda: VectorQuantizerEMA(D, K, channel_dim=1, codebook_dim=4),
    "residual": lambda: ResidualVectorQuantizer(D, K, channel_dim=1, num_quantizers=3),
}


def picture(seed=0):
    return cases.normal(2, 3, 8, 6, seed=seed)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [Whole, Codec])
def test_evaluation_graphs(name, kind, tmp_path):
    torch.manual_seed(1)
    broken = picture(2)
    broken[0, 0, 4, 4] = math.nan
    agree(kind(LAYERS[name]()).eval(), (picture(),), tmp_path / "model.onnx", others=[(picture(1),), (broken,)][: 1 + (kind is Whole)])


@pytest.mark.parametrize("name", ["moving average", "residual"])
def test_masks(name, tmp_path):
    torch.manual_seed(1)
    mask = torch.arange(2 * 8 * 6).view(2, 8, 6) % 3 > 0
    agree(Masked(LAYERS[name]()).eval(), (picture(), mask), tmp_path / "model.onnx", others=[(picture(1), ~mask)])


class Tuple(Encoder):
    """Around a layer that returns a tuple, as the faces do."""

    def forward(self, x):
        return tuple(self.quantizer(self.convolution(x))[:2])


FACES = {
    "VectorQuantize": lambda: face.VectorQuantize(D, K, accept_image_fmap=True),
    "VectorQuantize, cosine": lambda: face.VectorQuantize(D, K, accept_image_fmap=True, use_cosine_sim=True, codebook_dim=4),
    "ResidualVQ": lambda: face.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3, accept_image_fmap=True),
    "SimVQ": lambda: face.SimVQ(D, K, channel_first=True),
}


@pytest.mark.parametrize("name", FACES)
def test_faces_of_vector_quantize_pytorch(name, tmp_path):
    torch.manual_seed(1)
    agree(Tuple(FACES[name]()).eval(), (picture(),), tmp_path / "model.onnx", others=[(picture(1),)])


def test_training_graphs_are_refused(tmp_path):
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(
            Whole(LAYERS["moving average"]()).train(), (picture(),), dynamo=True, custom_translation_table=translations(), verbose=False
        )

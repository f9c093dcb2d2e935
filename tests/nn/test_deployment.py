"""AOTInductor: an evaluation graph compiled ahead of time into a package gives the same codes when the package is loaded again."""

import shutil
import sys

import cases
import pytest
import torch
from check import same
from layers import DIM, make

from vqfast.compat.vector_quantize_pytorch import ResidualVQ

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="native: AOTInductor needs a C++ compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="platform: AOTInductor packages are tested on Linux and macOS"),
]


class Codec(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.quantizer = torch.nn.Conv2d(3, DIM, 3, padding=1), make("ema", channel_dim=1)

    def forward(self, x):
        out = self.quantizer(self.encoder(x))
        return out.quantized, out.indices, self.quantizer.decode(out.indices)


class Face(torch.nn.Module):
    """The same with the face of vector_quantize_pytorch's layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Conv2d(3, DIM, 3, padding=1)
        self.quantizer = ResidualVQ(dim=DIM, codebook_size=32, num_quantizers=3, accept_image_fmap=True)

    def forward(self, x):
        quantized, indices, _ = self.quantizer(self.encoder(x))
        return quantized, indices, self.quantizer.get_output_from_indices(indices)


@pytest.mark.parametrize("kind", [Codec, Face])
def test_a_compiled_package_keeps_the_codes(kind, tmp_path):
    model, x = kind().eval(), cases.normal(2, 3, 8, 8)
    rows = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "codec.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for batch in (x, cases.normal(5, 3, 8, 8, seed=1)):
            quantized, indices, decoded = loaded(batch)
            wanted = model(batch)
            same(indices, wanted[1])
            torch.testing.assert_close(quantized, wanted[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(decoded, wanted[2], rtol=1e-5, atol=1e-6)

"""The layout that Hugging Face's `kernels` loads: found by its loader without a network, with and without an installed vqfast.

In a process of its own with `python -P` and from another folder: this repository has a folder named kernels, too.
"""

import os
import subprocess
import sys

import pytest

from vqfast import _backends
from vqfast.compat.kernels_layout import variant, write_kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_backends.cpu_level() is None, reason="native: the kernel is the CPU library, which is not built here"),
]

LOAD = """
import sys
from pathlib import Path
try:
    import kernels
except ModuleNotFoundError:
    print("SKIP"); sys.exit()
class Hide:  # an installed vqfast
    def find_spec(self, name, path=None, target=None):
        if name == "vqfast":
            raise ModuleNotFoundError(name, name=name)
if sys.argv[2] == "hidden":
    sys.meta_path.insert(0, Hide())
    sys.modules.pop("vqfast", None)
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
import torch, vqfast
assert ("_bundle" in vqfast.__file__) == (sys.argv[2] == "hidden"), vqfast.__file__
"""

FUNCTIONS = """
torch.manual_seed(0)
x, codebook = torch.randn(50, 6), torch.randn(20, 6)
truth = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
assert torch.equal(kernel.nearest(x, codebook).indices, truth)
assert "runs on cpu" in vqfast.explain("nearest", x, codebook)
assert torch.equal(kernel.gather(codebook, truth), codebook[truth])
assert kernel.vector_quantize(x, codebook).quantized.shape == x.shape
assert torch.ops.vqfast.nearest_cpu(x[None, None], codebook[None], 0)[1].flatten().equal(truth)
"""

LAYERS = """
from torch import nn
@kernels.use_kernel_forward_from_hub("Video")
class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
    def forward(self, hidden_state):
        raise AssertionError("the kernel's forward should run")
repository = kernels.LocalLayerRepository(repo_path=Path(sys.argv[1]), layer_name="VideoQuantizer")
module, z = Video(), torch.randn(2, 3, 4, 5, 5)
with kernels.use_kernel_mapping({"Video": {"cpu": repository}}, inherit_mapping=False):
    module = kernels.kernelize(module, mode=kernels.Mode.INFERENCE, device="cpu")
rows = z.movedim(2, -1).double().flatten(0, -2)
truth = torch.cdist(rows, module.embedding.weight.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
assert torch.equal(module(z).flatten(), truth) and module(z).shape == (2, 3, 5, 5)
for name in ("ImageQuantizer", "SphericalImageQuantizer", "VideoQuantizer", "VectorQuantizer2"):
    layer = getattr(kernel.layers, name)
    assert layer.__init__ is nn.Module.__init__ and issubclass(layer, nn.Module)
"""


def run(source, folder, *args):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-W", "ignore", "-c", source, str(folder / "kernel"), *args]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.strip() == "SKIP":
        pytest.skip("kernels is not installed (pip install kernels)")


@pytest.mark.parametrize("installed", ["installed", "hidden"])
def test_functions_and_operators(tmp_path, installed):
    path = write_kernel(tmp_path / "kernel")
    assert path == tmp_path / "kernel" / "build" / variant() and (path / "metadata.json").exists()
    run(LOAD + FUNCTIONS, tmp_path, installed)


def test_layers_take_the_place_of_a_forward(tmp_path):
    write_kernel(tmp_path / "kernel")
    run(LOAD + LAYERS, tmp_path, "installed")


def test_writing_again_replaces_the_variant(tmp_path):
    first = write_kernel(tmp_path / "kernel")
    (first / "stale.py").write_text("")
    again = write_kernel(tmp_path / "kernel")
    assert again == first and not (again / "stale.py").exists()
    assert not list(again.rglob("__pycache__")) and len(list((tmp_path / "kernel" / "build").iterdir())) == 1

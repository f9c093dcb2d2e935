"""LPIPS and FID with weights that are already on this machine (`vqfast data metrics` fetches them); nothing is
downloaded here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vqfast._files import hash_tensors
from vqfast.data import default_folder

LEAST_SIDE = 32  # below this AlexNet's last layers have nothing left to look at
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own input normalisation, for [-1, 1]
_ALEX_SHA256 = "00ec45d0df380ca3b4eff9e92be8cc08be30f9aae78942be09bae02a57c3acc3"  # of the tensors, see hash_tensors
# AlexNet's convolutions: (stride, padding, whether a 3x3 stride-2 max pool comes before). Each ends in a ReLU, and
# all five are compared.
_ALEX = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))


def lpips_function(folder: Path | None = None) -> Callable[[Tensor, Tensor], list[float]] | None:
    """LPIPS (AlexNet, version 0.1) of pairs of uint8 RGB pictures [B, 3, H, W]; None when its weights are not here.

    d = sum over layers of mean over positions of w . (a/|a| - b/|b|)^2, with a, b the layer's channels.

    Args:
        folder: with `lpips-alexnet.safetensors`; None: where `vqfast data metrics` puts it.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv
    1801.03924), eq. 1.
    """
    path = (folder or default_folder("metrics")) / "lpips-alexnet.safetensors"
    if not path.is_file():
        return None
    from safetensors.torch import load_file

    weights = load_file(path)
    if hash_tensors(weights) != _ALEX_SHA256:
        raise ValueError(
            f"{path} is altered: its tensors are not the published ones; delete it and run: vqfast data metrics"
        )

    @torch.no_grad()
    def lpips(a: Tensor, b: Tensor) -> list[float]:
        if min(a.shape[2:]) < LEAST_SIDE or a.shape[1] != 3:
            return []
        total = torch.zeros(len(a))
        for layer, (x, y) in enumerate(zip(_alexnet(weights, a), _alexnet(weights, b), strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            total += F.conv2d(difference, weights[f"NetLinLayer_{layer}.Conv_0.weight"]).mean((1, 2, 3))
        return total.tolist()

    return lpips


def _alexnet(weights: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """The outputs of AlexNet's five convolutions for uint8 pictures."""
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    x, outputs = ((pixels.float() / 127.5 - 1) - shift) / scale, []
    for number, (stride, padding, pooled) in enumerate(_ALEX):
        x = F.max_pool2d(x, 3, 2) if pooled else x
        name = f"AlexNet_0.Conv_{number}"
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding))
        outputs.append(x)
    return outputs


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class Frechet:
    """FID between two sets of pictures, gathered batch by batch; features are Inception's 2,048 pooled ones.

    Pictures are scaled to 299 x 299 bilinearly with antialiasing. FID is biased by the number of pictures, so
    compare only figures of equally many.

    Args:
        folder: with `fid-inception.pt` (TorchScript, its sha256 is checked when it is fetched).

    Raises:
        FileNotFoundError: the weights are not here.
    """

    def __init__(self, folder: Path | None = None):
        path = (folder or default_folder("metrics")) / "fid-inception.pt"
        if not path.is_file():
            raise FileNotFoundError(f"FID needs {path}; fetch it with: vqfast data metrics")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, these published weights come in nothing else
            self._net = torch.jit.load(str(path)).eval()
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])

    @torch.no_grad()
    def add(self, originals: Tensor, restored: Tensor) -> None:
        """Takes pairs of uint8 pictures [B, C, H, W]."""
        for kept, pixels in zip(self._features, (originals, restored), strict=True):
            x = pixels.expand(-1, 3, -1, -1).float() / 127.5 - 1
            x = F.interpolate(x, (299, 299), mode="bilinear", antialias=True, align_corners=False)
            kept += [self._net(part).double() for part in x.split(8)]

    def distance(self) -> float:
        """|mean difference|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances; needs two pictures or more."""
        return frechet_distance(*(torch.cat(kept) for kept in self._features))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians with the means and covariances of the rows of a and b, in float64.

    With A = X'X and B = Y'Y, X and Y the centred and scaled rows, the trace of (A B)^(1/2) is the sum of the singular
    values of X Y', also for fewer rows than features.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError("the Frechet distance needs two pictures or more")
    x, y = (rows - rows.mean(0) for rows in (a, b))
    x, y = x / (len(a) - 1) ** 0.5, y / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.t()).sum()
    value = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return max(0.0, float(value))

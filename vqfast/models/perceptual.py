"""Perceptual measures for judging reconstructions: LPIPS and the Frechet distance (FID).

Their weights are not part of the package; `vqfast data metrics` fetches them into a folder, checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._files import hash_tensors
from .pretrained import ModelFileError

# hash_tensors of the converted weights.
_HASHES = {
    "vgg16": "93d81a15e413b50b88040844d4198f07df4f80f41fe962f6cf1962e3388e67e0",
    "alexnet": "00ec45d0df380ca3b4eff9e92be8cc08be30f9aae78942be09bae02a57c3acc3",
}
# Mean and standard deviation of ImageNet's channels, for pictures in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
INCEPTION_SIZE = 299


class _VGG16(nn.Module):
    """The convolutions of VGG-16; its features are the last ReLU outputs before each of five poolings."""

    widths = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        layers = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip([3, *layers], layers, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number, conv in enumerate(self.convs):
            if number in (2, 4, 7, 10):
                features.append(x)
                x = F.max_pool2d(x, 2)
            x = F.relu(conv(x))
        return [*features, x]


class _AlexNet(nn.Module):
    """The convolutions of AlexNet; its features are the five ReLU outputs."""

    widths = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        shapes = (
            (3, 64, 11, 4, 2),
            (64, 192, 5, 1, 2),
            (192, 384, 3, 1, 1),
            (384, 256, 3, 1, 1),
            (256, 256, 3, 1, 1),
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, size, stride, padding) for i, o, size, stride, padding in shapes
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number, conv in enumerate(self.convs):
            if number in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(conv(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Learned perceptual distance: weighted squared differences of unit-length features, as a mean.

    Shapes:
        x, y: [B, 3, H, W] in [-0.5, 0.5], at least 32 pixels each way; result [B] float32, 0 when equal.

    Args:
        net: "vgg16" or "alexnet".

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (arXiv 1801.03924), eq. 1, weights of version 0.1.
    """

    def __init__(self, net: str = "vgg16"):
        super().__init__()
        if net not in _HASHES:
            raise ValueError(f"net is {net!r}, it must be one of {', '.join(_HASHES)}")
        self.net = _VGG16() if net == "vgg16" else _AlexNet()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(1, width, 1, 1)) for width in self.net.widths
        )
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str | Path, net: str = "vgg16") -> LPIPS:
        """LPIPS with its weights from the folder that `vqfast data metrics` filled.

        Raises:
            FileNotFoundError: they are not there. ModelFileError: they are damaged or others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        metric, path = cls(net), Path(folder) / f"lpips-{net}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; fetch the weights with: vqfast data metrics")
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ModelFileError(
                f"{path} is damaged ({error}); remove it and run: vqfast data metrics"
            ) from None
        if hash_tensors(saved) != _HASHES[net]:
            raise ModelFileError(
                f"{path} does not hold LPIPS' weights; remove it and run: vqfast data metrics"
            )
        trunk = "VGG16_0" if net == "vgg16" else "AlexNet_0"
        state = {f"weights.{i}": saved[f"NetLinLayer_{i}.Conv_0.weight"] for i in range(5)}
        for i in range(len(metric.net.convs)):
            state |= {
                f"net.convs.{i}.{part}": saved[f"{trunk}.Conv_{i}.{part}"] for part in ("weight", "bias")
            }
        metric.load_state_dict(state)
        return metric

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 32:
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} must both be [B, 3, H, W] of at least 32x32"
            )
        features = [self.net((2 * picture.float() - self.shift) / self.scale) for picture in (x, y)]
        total = x.new_zeros(len(x), dtype=torch.float32)
        for weight, a, b in zip(self.weights, *features, strict=True):
            difference = (_unit(a) - _unit(b)).square()
            total += (difference * weight).sum(1).mean((1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the Inception network that FID is defined with.

    Shapes: [B, 3, H, W] in [-0.5, 0.5] -> [B, 2048] float32. Pictures are scaled to 299x299 (bicubic,
    antialiased), so numbers compare with those of other tools only where these scale alike.

    Raises:
        FileNotFoundError: `folder` has no fid-inception.pt.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500).
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        path = Path(folder) / "fid-inception.pt"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; fetch the weights with: vqfast data metrics")
        self.net = torch.jit.load(path, map_location="cpu").eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        size = (INCEPTION_SIZE, INCEPTION_SIZE)
        scaled = F.interpolate(x.float(), size, mode="bicubic", align_corners=False, antialias=True)
        return self.net((2 * scaled).clamp(-1, 1)).float()


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, in float64.

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int = 2048):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Adds a batch [B, dim] (any dtype and device) by Chan's pairwise update, which cancels nothing."""
        batch = features.detach().double().cpu()
        if not len(batch):
            return
        centre = batch.mean(0)
        shift, total = centre - self.mean, self.count + len(batch)
        self._scatter += (batch - centre).T @ (batch - centre)
        self._scatter += torch.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[dim, dim] float64, unbiased.

        Raises:
            ValueError: fewer than two vectors were added.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), from eigenvalues of symmetric matrices only.

    Far fewer pictures than features bias it upwards; 10,000 and more are usual.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    trace = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return float((first.mean - second.mean).square().sum() + trace)


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall of drawn pictures by their features.

    precision: share of drawn vectors within the distance of some real vector to its k-th nearest real neighbour;
    recall: the same with the two sets exchanged.

    Shapes:
        real: [N, F]; drawn: [M, F]; any floating dtype, more than `neighbours` vectors each.

    Args:
        neighbours: k.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (arXiv
    1904.06991), eq. 1 and 2.
    """
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(f"{len(real)} real and {len(drawn)} drawn vectors: both must be more than {neighbours}")
    real, drawn = real.double(), drawn.double()
    between = torch.cdist(real, drawn)
    precision = (between <= _reach(real, neighbours)[:, None]).any(0)
    recall = (between <= _reach(drawn, neighbours)[None]).any(1)
    return precision.double().mean().item(), recall.double().mean().item()


def _reach(vectors: Tensor, neighbours: int) -> Tensor:
    """Each vector's distance to its k-th nearest other vector."""
    return torch.cdist(vectors, vectors).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself

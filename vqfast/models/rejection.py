"""Classifier-based rejection sampling: draw more pictures than needed, keep those that a classifier finds most
like their class.

Source: Razavi et al. 2019 (1906.00446), section 3.3. The paper scores a sample by the probability that a
classifier trained on
reconstructions gives to the class it was drawn for; keeping fewer trades diversity for accuracy.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """classes, in_channels, width of the first stage, stages that each halve the picture and double the width."""

    classes: int
    in_channels: int = 3
    width: int = 32
    stages: int = 3

    def __post_init__(self):
        for name in ("classes", "in_channels", "width", "stages"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be a whole number of at least 1")


class PictureClassifier(PretrainedModel):
    """A small convolutional classifier for pictures of any size of at least 2**stages pixels.

    Shapes: [B, in_channels, H, W] in [-0.5, 0.5] -> logits [B, classes]; `features` -> [B, width * 2**(stages - 1)].
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig | None = None, **fields):
        super().__init__(config, **fields)
        c = self.config
        widths = [c.in_channels] + [c.width * 2**i for i in range(c.stages)]
        self.body = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(math.gcd(b, 8), b), nn.ReLU(), nn.AvgPool2d(2))
            for a, b in zip(widths, widths[1:])
        ))  # fmt: skip
        self.head = nn.Linear(widths[-1], c.classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: the mean over all places."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(
    classifier: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], learning_rate: float = 1e-3
) -> float:
    """One Adam step per batch of (pictures, labels); returns the accuracy over the last tenth of the batches.

    For rejection, the pictures should be reconstructions (`model(x).reconstruction`): a classifier trained on
    them judges
    samples by what the decoder can draw, not by what it cannot.
    """
    classifier.train()
    optimizer, correct = torch.optim.Adam(classifier.parameters(), learning_rate), []
    for pictures, labels in batches:
        logits = classifier(pictures)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        correct.append((logits.argmax(1) == labels).float().mean().item())
    classifier.eval()
    if not correct:
        raise ValueError("there were no batches to train the classifier on.")
    last = correct[-max(1, len(correct) // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def class_scores(classifier: nn.Module, pictures: Tensor, labels: Tensor, batch_size: int = 64) -> Tensor:
    """log p(label | picture) by the classifier. Shapes: [B, C, H, W], [B] -> [B] float64."""
    parts = [classifier(chunk).double().log_softmax(1) for chunk in pictures.split(batch_size)]
    return torch.cat(parts).gather(1, labels[:, None])[:, 0]


def keep_best(scores: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """Indices, ascending, of the best ceil(fraction * n) samples of each class; equal scores keep the earlier one.

    Raises:
        ValueError: fraction is not in (0, 1], or the shapes differ.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1].")
    if scores.shape != labels.shape or scores.dim() != 1:
        raise ValueError(f"scores are {list(scores.shape)}, labels {list(labels.shape)}; both must be [B].")
    kept = []
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        order = torch.sort(torch.nan_to_num(scores[mine], nan=-math.inf), descending=True, stable=True).indices
        kept.append(mine[order[: math.ceil(fraction * len(mine))]])
    return torch.cat(kept).sort().values if kept else labels.new_zeros(0)


def rejection_sample(
    draw: Callable[[Tensor, int], Tensor], classifier: nn.Module, labels: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """One picture per label, each the best by the classifier of a class's pool of ceil(n / fraction) candidates.

    Args:
        draw: draw(labels [n], first_image) -> pictures [n, C, H, W]; first_image counts the pictures drawn
        before, for the noise.
        classifier: pictures -> logits.
        labels: [B] classes wanted; each class draws its own pool.
        fraction: of the candidates that are kept.

    Returns:
        (pictures [B, C, H, W] in labels' order, log p(label | picture) [B]).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1].")
    pictures: list[Tensor | None] = [None] * len(labels)
    scores = torch.zeros(len(labels), dtype=torch.float64)
    drawn = 0
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0].tolist()
        pool = label.expand(math.ceil(len(places) / fraction))
        candidates = draw(pool, drawn)
        drawn += len(pool)
        found = class_scores(classifier, candidates, pool)
        best = torch.sort(torch.nan_to_num(found, nan=-math.inf), descending=True, stable=True).indices[: len(places)]
        for place, index in zip(places, best.tolist()):
            pictures[place], scores[place] = candidates[index], found[index]
    if not pictures:
        raise ValueError("labels is empty; name at least one class.")
    return torch.stack(pictures), scores


# ---- accuracy against diversity ----------------------------------------------------------------------------


class CurvePoint(NamedTuple):
    """fraction kept; accuracy: share that the judge assigns to their class; diversity: see
    `accuracy_diversity_curve`."""

    fraction: float
    kept: int
    accuracy: float
    diversity: float


def accuracy_diversity_curve(
    scores: Tensor,
    labels: Tensor,
    correct: Tensor,
    features: Tensor,
    fractions: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.1),
) -> list[CurvePoint]:
    """What keeping fewer samples does.

    Args:
        scores: [B] from `class_scores`, of the classifier that rejects.
        labels: [B] classes the samples were drawn for.
        correct: [B] bool, whether a judge assigns the sample to its class; a second classifier makes a fairer
        judge than the first.
        features: [B, F] of the samples.
        fractions: to evaluate.

    Returns:
        One point per fraction. diversity is the mean distance between the features of two kept samples of one
        class, over the
        same mean for all samples: 1 when nothing is lost.
    """
    whole = _spread(features, labels)
    points = []
    for fraction in fractions:
        kept = keep_best(scores, labels, fraction)
        diversity = _spread(features[kept], labels[kept]) / whole if whole > 0 else math.nan
        points.append(CurvePoint(fraction, len(kept), correct[kept].double().mean().item(), diversity))
    return points


def _spread(features: Tensor, labels: Tensor) -> float:
    total, pairs = 0.0, 0
    for label in labels.unique():
        mine = features[labels == label].double()
        total += torch.pdist(mine).sum().item()
        pairs += len(mine) * (len(mine) - 1) // 2
    return total / pairs if pairs else 0.0


def curve_table(points: Sequence[CurvePoint]) -> str:
    """The curve as a Markdown table."""
    rows = [f"| {p.fraction:.2f} | {p.kept} | {100 * p.accuracy:.1f} % | {p.diversity:.3f} |" for p in points]
    return "\n".join(["| kept | samples | accuracy | diversity |", "|---|---|---|---|", *rows])


def plot_curve(points: Sequence[CurvePoint], path: str | os.PathLike) -> None:
    """The curve as a picture (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.diversity for p in points], [p.accuracy for p in points], "o-")
    for p in points:
        axes.annotate(f"{p.fraction:g}", (p.diversity, p.accuracy), textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel="diversity (1: all samples)", ylabel="accuracy", title="Fraction of samples kept")
    figure.savefig(path, dpi=150)

"""Classifier-based rejection: the best of each class are kept, and accuracy is traded for diversity."""

import pytest
import torch

from vqfast.models import rejection as r


def striped(labels, generator, noise=0.2):
    """Pictures whose class is the direction of their stripes."""
    ramp = torch.arange(8.0) % 2 - 0.5
    rows, columns = ramp[:, None].expand(8, 8), ramp[None].expand(8, 8)
    pictures = torch.stack([rows if label == 0 else columns for label in labels.tolist()])[:, None]
    return 0.3 * pictures + noise * torch.randn(len(labels), 1, 8, 8, generator=generator)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = r.PictureClassifier(classes=2, in_channels=1, width=8, stages=2)

    def batches():
        for _ in range(60):
            labels = torch.randint(2, (32,), generator=generator)
            yield striped(labels, generator), labels

    assert r.train_classifier(model, batches(), 1e-2) > 0.9
    return model


def test_keep_best_takes_the_best_of_each_class():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, torch.nan, 0.2], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert r.keep_best(scores, labels, 0.5).tolist() == [1, 2, 5]  # the tie keeps index 2, NaN goes last
    assert r.keep_best(scores, labels, 1.0).tolist() == list(range(6))
    assert r.keep_best(scores, labels, 0.01).tolist() == [1, 5]
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            r.keep_best(scores, labels, fraction)


def test_class_scores_are_log_probabilities(classifier):
    pictures, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 1, 0, 1])
    expected = classifier(pictures).double().log_softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(r.class_scores(classifier, pictures, labels, batch_size=2), expected)


def test_rejection_raises_the_scores_and_keeps_the_order(classifier):
    generator = torch.Generator().manual_seed(1)
    asked = []

    def draw(labels, first_image):
        asked.append((len(labels), first_image))
        return striped(labels, generator, noise=0.8)

    labels = torch.tensor([1, 0, 1, 1])
    plain, all_scores = r.rejection_sample(draw, classifier, labels, 1.0)
    best, best_scores = r.rejection_sample(draw, classifier, labels, 0.05)
    assert asked == [(1, 0), (3, 1), (20, 0), (60, 20)]
    assert plain.shape == best.shape == (4, 1, 8, 8)
    assert best_scores.mean() > all_scores.mean()
    torch.testing.assert_close(r.class_scores(classifier, best, labels), best_scores)


def test_curve_trades_diversity_for_accuracy(classifier, tmp_path):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(400) % 2
    # From clear to hopeless: keeping the best must leave the clear ones.
    noise = torch.linspace(0.1, 3, 400)[:, None, None, None]
    pictures = striped(labels, generator, noise=0.0) + noise * torch.randn(400, 1, 8, 8, generator=generator)
    scores = r.class_scores(classifier, pictures, labels)
    correct = classifier(pictures).argmax(1) == labels
    points = r.accuracy_diversity_curve(scores, labels, correct, pictures.flatten(1), (1.0, 0.5, 0.1))
    assert [p.kept for p in points] == [400, 200, 40]
    assert points[0].diversity == pytest.approx(1)
    assert points[0].accuracy < points[1].accuracy <= points[2].accuracy
    assert points[2].diversity < points[0].diversity
    assert r.curve_table(points).count("\n") == 4
    pytest.importorskip("matplotlib")
    r.plot_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000

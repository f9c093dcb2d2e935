"""LPIPS and FID: their arithmetic, and weights that come out of a pickle without anything being unpickled."""

import os
import pickle

import numpy as np
import pytest
import torch

from vqfast.data import DataFileError, default_folder
from vqfast.data.pickled_arrays import read_arrays
from vqfast.models import ModelFileError
from vqfast.models.perceptual import (
    LPIPS,
    FeatureStatistics,
    InceptionFeatures,
    frechet_distance,
    precision_recall,
)

# ---- weights -----------------------------------------------------------------------------------------------


def test_arrays_are_read_from_a_pickle():
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.random((3, 3, 2, 5), np.float32), "bias": np.zeros(5, np.float32)}, "b": {}}
    tree["c"] = {"d": {"kernel": np.ones((1, 1, 4, 1), np.float32)}}
    arrays = read_arrays(pickle.dumps(tree, protocol=3))
    assert sorted(arrays) == ["a.bias", "a.kernel", "c.d.kernel"]
    assert (arrays["a.kernel"] == tree["a"]["kernel"]).all() and arrays["c.d.kernel"].shape == (1, 1, 4, 1)


class Calls:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_nothing_in_a_pickle_is_called(tmp_path, protocol):
    for tree in ({"a": Calls(tmp_path / "made")}, {"a": {"b": [Calls(tmp_path / "made")]}}):
        with pytest.raises(DataFileError):
            read_arrays(pickle.dumps(tree, protocol=protocol))
    assert not (tmp_path / "made").exists()


def test_other_pickles_are_refused():
    good = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=3)
    assert read_arrays(good)["a"].tolist() == [1, 1, 1]
    fortran = np.asfortranarray(np.ones((2, 3), np.float32))
    for tree in (
        {"a": np.ones(3)},
        {"a": 1},
        {"a": np.ones(3, ">f4")},
        {"a": fortran},
        [np.ones(3, np.float32)],
    ):
        with pytest.raises(DataFileError):
            read_arrays(pickle.dumps(tree, protocol=3))
    for cut in range(0, len(good) - 1, 7):
        with pytest.raises(DataFileError):
            read_arrays(good[:cut])


def test_missing_and_foreign_weights_are_clear_errors(tmp_path):
    from safetensors.torch import save_file

    for load in (lambda: LPIPS.load(tmp_path), lambda: InceptionFeatures(tmp_path)):
        with pytest.raises(FileNotFoundError, match="vqfast data metrics"):
            load()
    (tmp_path / "lpips-vgg16.safetensors").write_bytes(b"123")
    with pytest.raises(ModelFileError, match="damaged"):
        LPIPS.load(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "lpips-alexnet.safetensors")
    with pytest.raises(ModelFileError, match="does not hold LPIPS"):
        LPIPS.load(tmp_path, "alexnet")
    with pytest.raises(ValueError, match="vgg16, alexnet"):
        LPIPS("resnet")


# ---- LPIPS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_lpips_is_a_symmetric_distance(net):
    torch.manual_seed(0)
    metric = LPIPS(net)
    for weight in metric.weights:
        weight.uniform_()
    x, y = torch.rand(2, 2, 3, 35, 47) - 0.5
    assert metric(x, x).tolist() == [0, 0]
    distance = metric(x, y)
    assert distance.shape == (2,) and distance.dtype == torch.float32 and (distance > 0).all()
    torch.testing.assert_close(distance, metric(y, x))
    torch.testing.assert_close(distance[1:], metric(x[1:], y[1:]), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at least 32x32"):
        metric(x[..., :31], y[..., :31])
    with pytest.raises(ValueError, match="must both"):
        metric(x, y[:1])


@pytest.mark.parametrize("net, expected", [("vgg16", 0.7937300205230713), ("alexnet", 0.5320973992347717)])
def test_lpips_with_its_weights_gives_the_reference_value(net, expected):
    """The expected numbers come from the JAX implementation that the weights are published with."""
    if not (default_folder("metrics") / f"lpips-{net}.safetensors").exists():
        pytest.skip("LPIPS' weights are not on this machine: vqfast data metrics")
    i = torch.arange(64.0, dtype=torch.float64)
    column = i[:, None]
    x = torch.stack([(column + i) / 126 - 0.5, (column - i) / 126, column * i / 3969 - 0.5])[None]
    got = LPIPS.load(default_folder("metrics"), net)(x, x[:, [1, 2, 0]])
    assert float(got) == pytest.approx(expected, rel=1e-4)


# ---- Frechet distance --------------------------------------------------------------------------------------


def statistics(rows, batch=1000):
    result = FeatureStatistics(rows.shape[1])
    for part in rows.split(batch):
        result.add(part)
    return result


def test_statistics_do_not_depend_on_the_batches():
    torch.manual_seed(0)
    # Far from the origin, where summing squares would lose ten digits.
    rows = 1e5 + torch.randn(1000, 6, dtype=torch.float64)
    for batch in (1, 7, 999, 1000):
        got = statistics(rows, batch)
        torch.testing.assert_close(got.mean, rows.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(got.covariance, rows.T.cov(), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(rows[:1]).covariance  # noqa: B018


def gaussian(mean, deviation):
    """Statistics of a diagonal Gaussian, without sampling."""
    result = FeatureStatistics(len(mean))
    result.count, result.mean = 3, torch.tensor(mean, dtype=torch.float64)
    result._scatter = torch.tensor(deviation, dtype=torch.float64).square().diag() * 2
    return result


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    first, second = gaussian([1.0, 2.0, 0.0], [1.0, 2.0, 0.0]), gaussian([0.0, 4.0, 0.0], [3.0, 0.5, 1.0])
    # |m1 - m2|^2 + sum (s1 - s2)^2
    assert frechet_distance(first, second) == pytest.approx(5 + 4 + 2.25 + 1, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_does_not_depend_on_the_axes():
    torch.manual_seed(0)
    a, b = torch.randn(200, 5, dtype=torch.float64), 2 * torch.randn(300, 5, dtype=torch.float64) + 1
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    plain = frechet_distance(statistics(a), statistics(b))
    assert plain == pytest.approx(frechet_distance(statistics(b), statistics(a)), rel=1e-10)
    assert plain == pytest.approx(frechet_distance(statistics(a @ turn), statistics(b @ turn)), rel=1e-10)


def test_precision_and_recall_count_neighbours_as_the_definition_says():
    torch.manual_seed(0)
    real, drawn = torch.randn(40, 3), 0.3 * torch.randn(30, 3) + 0.5

    def covered(points, by, k):
        """Share of `points` in the ball of any of `by` that reaches its k-th nearest other one."""
        reach = [sorted(float((a - b).norm()) for j, b in enumerate(by) if j != i)[k - 1] for i, a in enumerate(by)]
        inside = [any(float((p - a).norm()) <= r for a, r in zip(by, reach, strict=True)) for p in points]
        return sum(inside) / len(inside)

    for k in (1, 3):
        assert precision_recall(real, drawn, k) == (covered(drawn, real, k), covered(real, drawn, k))
    precision, recall = precision_recall(real, drawn)
    assert recall < precision, "a set in one corner of the other covers little of it"
    assert precision_recall(real, real) == (1, 1) and precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(real[:3], drawn)

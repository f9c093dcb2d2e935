"""Likelihoods: the discretized logistic is a probability over the 256 levels at every mean and scale."""

import math

import pytest
import torch

from vqfast.models import (
    Likelihood,
    discretized_logistic_nll,
    fit_logistic_scale,
    gaussian_nll,
    pixels_to_float,
)

LEVELS = pixels_to_float(torch.arange(256, dtype=torch.uint8), torch.float64)
MEANS = torch.tensor([-3.0, -0.5, -0.49, -0.1234, 0.0, 1 / 510, 0.3, 0.5, 0.7, 40.0], dtype=torch.float64)
LOG_SCALES = torch.tensor([-10.0, -7.0, -5.0, -3.0, -1.0, 0.0, 2.0, 5.0], dtype=torch.float64)


def all_levels(dtype=torch.float64):
    """The negative log probability of each level under each mean and scale: [256, means, scales]."""
    return discretized_logistic_nll(
        LEVELS.to(dtype)[:, None, None], MEANS.to(dtype)[None, :, None], LOG_SCALES.to(dtype)[None, None, :]
    )


def test_256_probabilities_sum_to_one():
    # The sum telescopes: neighbouring bins compute their common edge with different roundings of numbers near
    # 1, which the scale magnifies where the density is; and each of 256 terms is rounded a few times.
    error = (torch.exp(-all_levels()).sum(0) - 1).abs()
    assert (error <= 2.0**-50 * (256 + torch.exp(-LOG_SCALES))).all()


def test_equals_the_difference_of_two_sigmoids():
    mean, scale = 0.1, 0.07
    for level in (1, 100, 153, 254):
        x = level / 255 - 0.5
        edges = [1 / (1 + math.exp(-(x + side / 510 - mean) / scale)) for side in (1, -1)]
        got = discretized_logistic_nll(
            *(torch.tensor(value, dtype=torch.float64) for value in (x, mean, math.log(scale)))
        )
        # Subtracting two sigmoids of at least 3e-4 apart loses about 12 bits.
        assert math.exp(-float(got)) == pytest.approx(edges[0] - edges[1], rel=2.0**-36)


def test_outer_bins_hold_the_tails():
    far = torch.tensor(-9.0, dtype=torch.float64)
    first, second = discretized_logistic_nll(LEVELS[:2], far, torch.tensor(-3.0, dtype=torch.float64))
    assert float(first) < 1e-60  # all the mass is below level 0's upper edge
    assert float(second) > 150


def test_float32_agrees_with_float64():
    exact, single = all_levels(), all_levels(torch.float32).double()
    # The offset is rounded in units of at most 64 and then scaled; the logarithms are rounded themselves.
    offset = (LEVELS[:, None, None] - MEANS[None, :, None]).abs() + 1
    bound = 2.0**-24 * 8 * (1 + offset * torch.exp(-LOG_SCALES) + exact)
    assert ((single - exact).abs() <= bound).all()


def test_gradients_are_finite_everywhere():
    mean = MEANS.float()[None, :, None].expand(256, -1, len(LOG_SCALES)).clone().requires_grad_()
    log_scale = LOG_SCALES.float()[None, None, :].clone().requires_grad_()
    discretized_logistic_nll(LEVELS.float()[:, None, None], mean, log_scale).sum().backward()
    assert mean.grad.isfinite().all() and log_scale.grad.isfinite().all()
    # A mean below the level is pulled up, and the other way round.
    assert (mean.grad[200, 3] < 0).all() and (mean.grad[50, 6] > 0).all()


def test_gradient_matches_finite_differences():
    torch.manual_seed(0)
    x = LEVELS[torch.tensor([0, 1, 77, 254, 255])]
    mean = (x + 0.05 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    log_scale = torch.full((5,), -2.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: discretized_logistic_nll(x, m, s), (mean, log_scale))


def test_gaussian_is_the_normal_density():
    torch.manual_seed(0)
    x, mean, log_scale = torch.randn(3, 50, dtype=torch.float64)
    expected = -torch.distributions.Normal(mean, log_scale.exp()).log_prob(x)
    torch.testing.assert_close(gaussian_nll(x, mean, log_scale), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("scale", ["learned", "predicted", 0.05])
def test_likelihood_of_a_decoder_output_is_normalised(scale):
    torch.manual_seed(0)
    likelihood = Likelihood("discretized_logistic", 3, scale=scale)
    output = torch.randn(1, likelihood.decoder_channels, 2, 2, dtype=torch.float64)
    total = sum(torch.exp(-likelihood.nll(output, level.expand(1, 3, 2, 2))) for level in LEVELS)
    assert total.shape == (1, 3, 2, 2)
    # The learned scale is a float32 parameter, but the arithmetic is float64.
    assert (total - 1).abs().max() < 1e-12
    assert likelihood.decoder_channels == (6 if scale == "predicted" else 3)


def test_mse_is_divided_by_the_variance():
    output, x = torch.tensor([0.5, -0.25]).view(1, 2, 1, 1), torch.tensor([0.25, 0.25]).view(1, 2, 1, 1)
    assert Likelihood("mse", 2, data_variance=0.5).nll(output, x).flatten().tolist() == [0.125, 0.5]


def test_bits_ask_for_a_scale_where_there_is_none():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="fit_logistic_scale"):
        Likelihood("mse", 1).bits(x, x)
    with pytest.raises(ValueError, match="own scale"):
        Likelihood("discretized_logistic", 1).bits(x, x, scale=0.1)
    bits = Likelihood("gaussian", 1).bits(x, x, scale=0.1)
    assert bits.dtype == torch.float64 and float(bits) > 0


def test_fitted_scale_is_the_best_one():
    torch.manual_seed(0)
    mean = torch.rand(1, 3, 16, 16, dtype=torch.float64) - 0.5
    x = (mean + 0.05 * torch.randn_like(mean)).clamp(-0.5, 0.5)
    scale = fit_logistic_scale(mean, x)
    likelihood = Likelihood("mse", 3)
    best = float(likelihood.bits(mean, x, scale))
    grid = [float(likelihood.bits(mean, x, math.exp(i / 20))) for i in range(-140, 40)]
    assert best <= min(grid) + 1e-6
    with pytest.raises(ValueError, match="same shape"):
        fit_logistic_scale(mean, x[:, :2])

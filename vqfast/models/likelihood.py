"""What a decoder's output says about a picture: reconstruction losses and exact bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIKELIHOODS = ("mse", "gaussian", "discretized_logistic")
LEVELS = 256
# About the variance of photographs in [-0.5, 0.5] (CIFAR-10: 0.063, the embedded photographs: 0.069).
NATURAL_VARIANCE = 0.0625
# Half the distance between two of the 256 levels of a picture in [-0.5, 0.5].
HALF_BIN = 0.5 / (LEVELS - 1)
# exp of these bounds every scale: the narrowest puts all mass in one bin, the widest is flat over the 256.
MIN_LOG_SCALE, MAX_LOG_SCALE = -10.0, 5.0


def gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log density of a Gaussian: 0.5 ((x - mean) / s)^2 + log s + 0.5 log(2 pi), s = exp(log_scale).

    Shapes:
        x, mean: the same; log_scale: broadcastable to them.

    Returns:
        Nats per element (a density: may be negative), in the inputs' dtype.
    """
    return 0.5 * ((x - mean) * torch.exp(-log_scale)).square() + log_scale + 0.5 * math.log(2 * math.pi)


def discretized_logistic_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log probability of an 8-bit level under a logistic distribution cut into 256 bins.

    Level k stands at k / 255 - 0.5. Its bin reaches half a step to both sides; the first bin reaches to minus
    infinity and the last to plus infinity, so the 256 probabilities sum to 1 exactly. With a, b the bin's
    upper and lower edge in units of the scale, log(sigmoid(a) - sigmoid(b)) is computed as
    log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)), which cancels nothing and needs no clamp.

    Shapes:
        x, mean: the same; log_scale: broadcastable to them.

    Args:
        x: picture in [-0.5, 0.5]; rounded to the nearest of the 256 levels.
        mean: the decoder's mean, same units.
        log_scale: log of the logistic's scale, same units.

    Returns:
        Nats per element, in the inputs' dtype (compute in float32 or float64).

    Source: Salimans et al., "PixelCNN++" (arXiv 1701.05517), eq. 2, with one component.
    """
    level = ((x + 0.5) * (LEVELS - 1)).round().clamp(0, LEVELS - 1)
    offset = level / (LEVELS - 1) - 0.5 - mean
    inverse_scale = torch.exp(-log_scale)
    below = F.logsigmoid((offset + HALF_BIN) * inverse_scale)
    above = F.logsigmoid((HALF_BIN - offset) * inverse_scale)
    width = torch.log(-torch.expm1(-2 * HALF_BIN * inverse_scale))
    inner = below + above + width
    return -torch.where(level == 0, below, torch.where(level == LEVELS - 1, above, inner))


class Likelihood(nn.Module):
    """Splits a decoder's output into mean and scale and scores pictures under it.

    Args:
        kind: "mse" (mean squared error / data_variance), "gaussian" or "discretized_logistic".
        channels: of the picture.
        data_variance: what "mse" is divided by (Sonnet: the variance of the training pictures).
        scale: "learned": one learned scale per channel; "predicted": the decoder gives one per pixel and
            channel; a float: fixed. Unused by "mse".
    """

    def __init__(self, kind: str, channels: int, data_variance: float = 1.0, scale: str | float = "learned"):
        super().__init__()
        self.kind, self.channels, self.data_variance, self.scale = kind, channels, data_variance, scale
        self.predicts_scale = kind != "mse" and scale == "predicted"
        if kind != "mse" and scale == "learned":
            # exp(-2) is about the spread of natural pictures, where training starts from a blurred mean.
            self.log_scale = nn.Parameter(torch.full((channels, 1, 1), -2.0))

    @property
    def decoder_channels(self) -> int:
        """How many channels the decoder has to give."""
        return 2 * self.channels if self.predicts_scale else self.channels

    def mean(self, output: Tensor) -> Tensor:
        """The picture in a decoder's output. Shapes: [B, decoder_channels, H, W] -> [B, channels, H, W]."""
        return output[:, : self.channels]

    def nll(self, output: Tensor, x: Tensor) -> Tensor:
        """Loss per element, float32 (float64 for float64 input) also under autocast.

        Shapes:
            output: [B, decoder_channels, H, W]; x: [B, channels, H, W] in [-0.5, 0.5]; result like x.

        Returns:
            "mse": (mean - x)^2 / data_variance; otherwise nats.
        """
        output = output if output.dtype == torch.float64 else output.float()
        x = x.to(output.dtype)
        mean = self.mean(output)
        if self.kind == "mse":
            return (mean - x).square() / self.data_variance
        nll = gaussian_nll if self.kind == "gaussian" else discretized_logistic_nll
        return nll(x, mean, self._log_scale(output))

    def _log_scale(self, output: Tensor) -> Tensor:
        if self.predicts_scale:
            # The same start as the learned scale: the decoder predicts the deviation from it.
            log_scale = output[:, self.channels :] - 2.0
        elif self.scale == "learned":
            log_scale = self.log_scale.to(output.dtype)
        else:
            log_scale = output.new_tensor(math.log(self.scale))
        return log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)

    def bits(self, output: Tensor, x: Tensor, scale: float | None = None) -> Tensor:
        """Exact bits per picture dimension of 8-bit pictures, given the latents.

        Args:
            output: [B, decoder_channels, H, W].
            x: [B, channels, H, W] in [-0.5, 0.5].
            scale: scale of the logistic for likelihoods that do not define probabilities of 8-bit levels
                ("mse" and "gaussian"); see `fit_logistic_scale`. None for "discretized_logistic".

        Returns:
            0-d float64, mean over all pictures, channels and pixels.

        Raises:
            ValueError: scale is given where the model has its own, or missing where it has none.
        """
        own = self.kind == "discretized_logistic"
        if own == (scale is not None):
            raise ValueError(
                f"bits per dimension of likelihood {self.kind!r} with scale={scale}: "
                + (
                    "the model has its own scale, pass none"
                    if own
                    else "this likelihood gives no probability to 8-bit levels, pass the scale that "
                    "fit_logistic_scale(reconstruction, x) finds"
                )
            )
        output, x = output.double(), x.double()
        log_scale = self._log_scale(output) if own else output.new_tensor(math.log(scale))
        return discretized_logistic_nll(x, self.mean(output), log_scale).mean() / math.log(2)


def fit_logistic_scale(reconstruction: Tensor, x: Tensor, tolerance: float = 1e-3) -> float:
    """The one scale under which a discretized logistic around `reconstruction` gives `x` the fewest bits.

    Golden-section search over the logarithm of the scale. For honest bits of a test set, fit on training
    pictures.

    Args:
        reconstruction, x: the same shape, [-0.5, 0.5].
        tolerance: relative precision of the scale.

    Returns:
        The scale, in units of the picture.
    """
    if reconstruction.shape != x.shape or x.numel() == 0:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and x {tuple(x.shape)} must have the same shape, "
            "not empty"
        )
    reconstruction, x = reconstruction.detach().double(), x.detach().double()

    def bits(log_scale: float) -> float:
        return float(discretized_logistic_nll(x, reconstruction, x.new_tensor(log_scale)).mean())

    ratio = (math.sqrt(5) - 1) / 2
    low, high = MIN_LOG_SCALE, MAX_LOG_SCALE
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = bits(left), bits(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = bits(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = bits(right)
    return math.exp((low + high) / 2)

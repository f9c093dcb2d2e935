"""Models built from vqfast's layers. Pictures are floats in [-0.5, 0.5], [B, C, H, W]: `pixels_to_float`."""

from .likelihood import Likelihood, discretized_logistic_nll, fit_logistic_scale, gaussian_nll
from .pixels import float_to_pixels, pad_to_multiple, pixels_to_float
from .presets import PRESETS, Preset, TrainingSettings, get_preset
from .pretrained import ModelFileError, PretrainedModel, load_pretrained
from .vae import VAE, VAEConfig, VAEOutput
from .vqvae import VQVAE, BitsPerDim, ModelOutput, VQVAEConfig

__all__ = [
    "PRESETS",
    "VAE",
    "VQVAE",
    "BitsPerDim",
    "Likelihood",
    "ModelFileError",
    "ModelOutput",
    "Preset",
    "PretrainedModel",
    "TrainingSettings",
    "VAEConfig",
    "VAEOutput",
    "VQVAEConfig",
    "discretized_logistic_nll",
    "fit_logistic_scale",
    "float_to_pixels",
    "gaussian_nll",
    "get_preset",
    "load_pretrained",
    "pad_to_multiple",
    "pixels_to_float",
]

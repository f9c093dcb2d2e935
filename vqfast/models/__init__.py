"""Models built from vqfast's layers. Pictures are floats in [-0.5, 0.5], [B, C, H, W]: `pixels_to_float`."""

from .likelihood import Likelihood, discretized_logistic_nll, fit_logistic_scale, gaussian_nll
from .pixelcnn import GatedPixelCNN, GatedPixelCNNConfig, PixelCNN, PixelCNNConfig
from .pixels import float_to_pixels, pad_to_multiple, pixels_to_float
from .pixelsnail import PixelSNAIL, PixelSNAILConfig
from .presets import PRESETS, PRIOR_PRESETS, Preset, PriorPreset, TrainingSettings, get_preset
from .pretrained import ModelFileError, PretrainedModel, load_pretrained
from .priors import CodePrior, HierarchicalPrior, PriorConfig, image_bits_per_dim
from .vae import VAE, VAEConfig, VAEOutput
from .vqvae import VQVAE, BitsPerDim, ModelOutput, VQVAEConfig
from .vqvae2 import VQVAE2, VQVAE2Config

__all__ = [
    "PRESETS",
    "PRIOR_PRESETS",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "BitsPerDim",
    "CodePrior",
    "GatedPixelCNN",
    "GatedPixelCNNConfig",
    "HierarchicalPrior",
    "Likelihood",
    "ModelFileError",
    "ModelOutput",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "Preset",
    "PretrainedModel",
    "PriorConfig",
    "PriorPreset",
    "TrainingSettings",
    "VAEConfig",
    "VAEOutput",
    "VQVAE2Config",
    "VQVAEConfig",
    "discretized_logistic_nll",
    "fit_logistic_scale",
    "float_to_pixels",
    "gaussian_nll",
    "get_preset",
    "image_bits_per_dim",
    "load_pretrained",
    "pad_to_multiple",
    "pixels_to_float",
]

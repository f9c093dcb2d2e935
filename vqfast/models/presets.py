"""Named settings: a preset is data, a model's configuration and how to train it."""

from __future__ import annotations

from dataclasses import dataclass

from .pixelcnn import PIXELCNN_PRESETS, GatedPixelCNNConfig
from .pixelsnail import PIXELSNAIL_PRESETS
from .priors import PriorConfig
from .vae import VAE, VAEConfig
from .vqvae import VQVAE, VQVAEConfig
from .vqvae2 import VQVAE2, VQVAE2Config

# Variance of all values of CIFAR-10's 50,000 training pictures, scaled to a range of 1.
CIFAR10_VARIANCE = 0.06328692405746422


@dataclass(frozen=True)
class TrainingSettings:
    """How a preset is trained; the optimizer is Adam.

    Attributes:
        dataset: "cifar10", "photographs" (the embedded photographs) or "folder" (the user names one).
        size: side of the square crops, pixels.
        resize: shorter side to which pictures are scaled before they are cropped; 0 leaves them as they are.
        flip: mirror half of the crops horizontally.
        steps, batch_size, learning_rate: of the optimizer.
    """

    dataset: str
    size: int
    steps: int
    batch_size: int
    learning_rate: float
    resize: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Preset:
    """A model and its training under one name. `description` says where the numbers come from."""

    name: str
    description: str
    model: VQVAEConfig | VAEConfig | VQVAE2Config
    training: TrainingSettings

    def build(self) -> VQVAE | VAE | VQVAE2:
        """A fresh model."""
        return {VQVAEConfig: VQVAE, VAEConfig: VAE, VQVAE2Config: VQVAE2}[type(self.model)](self.model)


@dataclass(frozen=True)
class PriorPreset:
    """Priors over the codes of a model and their training; `description` says where the numbers come from.

    Attributes:
        levels: one network per level, finest first; a single one serves every level. What the codes decide (codebook
            sizes, classes, the level above) is taken from them.
        labels: condition on the pictures' classes.
        steps, batch_size, learning_rate: of Adam, the same for every level.
    """

    name: str
    description: str
    levels: tuple[PriorConfig, ...]
    labels: bool
    steps: int
    batch_size: int
    learning_rate: float


_SONNET_CIFAR10 = TrainingSettings(
    "cifar10", size=32, steps=10_000, batch_size=32, learning_rate=3e-4
)
_PAPER_CIFAR10 = TrainingSettings(
    "cifar10", size=32, steps=250_000, batch_size=128, learning_rate=2e-4
)

_ALL = (
    Preset(
        "cifar10",
        "Sonnet's published CIFAR-10 example: K = 512, D = 64, debiased moving averages, squared error over "
        "the pictures' variance; its log ends at reconstruction loss 0.056 and perplexity 326.",
        VQVAEConfig(rule="debiased", data_variance=CIFAR10_VARIANCE),
        _SONNET_CIFAR10,
    ),
    Preset(
        "cifar10-bits",
        "The cifar10 model with a discretized logistic likelihood, whose bits per dimension are exact.",
        VQVAEConfig(rule="debiased", likelihood="discretized_logistic", scale="predicted"),
        _SONNET_CIFAR10,
    ),
    Preset(
        "cifar10-vae",
        "A VAE of the same size, data, steps and likelihood as cifar10-bits.",
        VAEConfig(likelihood="discretized_logistic", scale="predicted"),
        _SONNET_CIFAR10,
    ),
    Preset(
        "cifar10-paper",
        "The VQ-VAE paper's CIFAR-10 model: 256 hidden, 8x8x10 latents, codebook loss, beta 0.25, Adam 2e-4, "
        "batch 128, 250,000 steps (reported: 4.67 bits/dim). The paper states neither K, D nor the "
        "likelihood: here 512 and 64 for each of the 10, and a discretized logistic.",
        VQVAEConfig(
            hidden=256,
            residual_hidden=256,
            dim=640,
            groups=10,
            quantizer="loss",
            likelihood="discretized_logistic",
            scale="predicted",
        ),
        _PAPER_CIFAR10,
    ),
    Preset(
        "cifar10-paper-vae",
        "The VAE to compare cifar10-paper with (reported: 4.51 bits/dim); 256 Gaussian latents at each of "
        "8x8 places.",
        VAEConfig(
            hidden=256, residual_hidden=256, dim=256, likelihood="discretized_logistic", scale="predicted"
        ),
        _PAPER_CIFAR10,
    ),
    Preset(
        "imagenet128",
        "The paper's 128x128 model with one 32x32 field of latents, K = 512; widths and batch from Sonnet's "
        "notes. The paper gives no number of steps for it: here the 250,000 of its CIFAR-10 model. Wants a "
        "folder of pictures.",
        VQVAEConfig(rule="debiased"),
        TrainingSettings(
            "folder", size=128, resize=128, flip=True, steps=250_000, batch_size=128, learning_rate=2e-4
        ),
    ),
    Preset(
        "photos",
        "For a folder of photographs, or the embedded ones: 64-pixel crops at full resolution, small "
        "batches, and codes that hardly anything chooses are replaced, so that a picture appears within "
        "minutes on two CPU cores.",
        VQVAEConfig(hidden=96, decay=0.95, revive_below=1.0, data_variance=0.069),
        TrainingSettings("photographs", size=64, flip=True, steps=2_000, batch_size=8, learning_rate=1e-3),
    ),
    Preset(
        "cifar10-vqvae2",
        "A VQ-VAE-2 small enough for two CPU cores: CIFAR-10 in 8x8 and 4x4 codes, K = 512, of which codes that hardly "
        "anything chooses are replaced.",
        VQVAE2Config(residual_hidden=32, revive_below=1.0, data_variance=CIFAR10_VARIANCE),
        TrainingSettings("cifar10", size=32, flip=True, steps=10_000, batch_size=32, learning_rate=1e-3),
    ),
    # Razavi et al. 2019, table of the appendix: hidden 128, residual 64, 2 layers, K 512, D 64, beta 0.25, decay 0.99,
    # batch 128, 2,207,444 steps for ImageNet and 304,741 for FFHQ.
    Preset(
        "imagenet256",
        "The VQ-VAE-2 paper's 256x256 model: codes of 64x64 and 32x32, K = 512. Wants a folder of pictures.",
        VQVAE2Config(),
        TrainingSettings(
            "folder", size=256, resize=256, flip=True, steps=2_207_444, batch_size=128, learning_rate=3e-4
        ),
    ),
    Preset(
        "ffhq1024",
        "The VQ-VAE-2 paper's 1024x1024 model: codes of 128x128, 64x64 and 32x32, K = 512. Wants a folder of pictures.",
        VQVAE2Config(stages=3, dims=(64, 64, 64), codebook_sizes=(512, 512, 512)),
        TrainingSettings(
            "folder", size=1024, resize=1024, flip=True, steps=304_741, batch_size=128, learning_rate=3e-4
        ),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}

_PRIORS = (
    PriorPreset(
        "small",
        "Gated PixelCNNs of 8 layers of 96 channels, for two CPU cores.",
        (GatedPixelCNNConfig(channels=96, layers=8, head_channels=256, condition_channels=96),),
        labels=False,
        steps=2_000,
        batch_size=32,
        learning_rate=1e-3,
    ),
    PriorPreset(
        "imagenet128",
        "A Gated PixelCNN of 15 layers of 128 channels over the 32x32 codes of the imagenet128 preset (the paper states "
        "neither its depth nor its training).",
        (PIXELCNN_PRESETS["vqvae-imagenet128"],),
        labels=True,
        steps=500_000,
        batch_size=128,
        learning_rate=3e-4,
    ),
    PriorPreset(
        "imagenet256",
        "The VQ-VAE-2 paper's PixelSNAILs for 256x256 ImageNet, with attention in the top prior only. Batch size and "
        "steps are ours.",
        (PIXELSNAIL_PRESETS["imagenet256-bottom"], PIXELSNAIL_PRESETS["imagenet256-top"]),
        labels=True,
        steps=1_000_000,
        batch_size=512,
        learning_rate=3e-4,
    ),
    PriorPreset(
        "ffhq1024",
        "The VQ-VAE-2 paper's three PixelSNAILs for 1024x1024 FFHQ. Batch size and steps are ours.",
        tuple(PIXELSNAIL_PRESETS[f"ffhq1024-{level}"] for level in ("bottom", "middle", "top")),
        labels=False,
        steps=500_000,
        batch_size=512,
        learning_rate=3e-4,
    ),
)

PRIOR_PRESETS: dict[str, PriorPreset] = {preset.name: preset for preset in _PRIORS}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


__all__ = ["CIFAR10_VARIANCE", "PRESETS", "PRIOR_PRESETS", "Preset", "PriorPreset", "TrainingSettings", "get_preset"]

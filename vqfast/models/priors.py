"""What every prior over codes shares: likelihood, bits, sampling; and the hierarchy of priors over the levels of
a VQ-VAE-2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pretrained import PretrainedModel
from .prior_blocks import ConditionStack
from .vqvae import BitsPerDim


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """Settings that every prior has.

    Args:
        codebook_size: number of codes, K.
        channels: width of the network.
        classes: number of class labels; 0 for none. Label -1 means "no class" (zeros), also in training.
        condition_codes: codebook size of the level above; 0 for none.
        condition_scale: how many times this level is larger than the one above, in height and width.
        condition_layers: residual blocks over the codes of the level above.
        condition_channels: width of those blocks and of the spatial condition.
    """

    codebook_size: int = 512
    channels: int = 128
    classes: int = 0
    condition_codes: int = 0
    condition_scale: int = 2
    condition_layers: int = 3
    condition_channels: int = 64

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if field.type in ("int", int) and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(
                    f"{type(self).__name__}.{field.name} is {value!r}; it must be an integer of at least {least}."
                )
            if field.name.endswith("kernel_size") and value % 2 == 0:
                raise ValueError(
                    f"{type(self).__name__}.{field.name} is {value}; a causal kernel has a centre, so it must be odd."
                )
            if field.name == "dropout" and not 0 <= value < 1:
                raise ValueError(f"{type(self).__name__}.dropout is {value!r}; it must be in [0, 1).")


_MAY_BE_ZERO = {"classes", "condition_codes", "condition_layers", "output_layers", "layers", "attention_heads"}


class CodePrior(PretrainedModel):
    """p(codes) = prod over positions in raster order of p(code | codes before it, class, codes of the level above).

    Subclasses build `embedding` and `condition_stack` through `_build_inputs` and implement `_network`.
    """

    config: PriorConfig

    def _build_inputs(self) -> None:
        c = self.config
        self.embedding = nn.Embedding(c.codebook_size, c.channels)
        self.condition_stack = None
        if c.condition_codes:
            self.condition_stack = ConditionStack(
                c.condition_codes, c.condition_channels, c.condition_layers, c.condition_scale
            )

    @property
    def _condition_channels(self) -> int:
        return self.config.condition_channels if self.config.condition_codes else 0

    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Logits of every position given the codes before it.

        **Shapes**: codes [B, H, W], labels [B], condition [B, H / scale, W / scale] -> [B, K, H, W].

        Args:
            codes: int64 in 0..K-1.
            labels: int64 in 0..classes-1, or -1 for no class; required when the prior has classes.
            condition: int64 codes of the level above; required when the prior has `condition_codes`.

        Returns:
            Logits, in the weights' dtype.

        Raises:
            ValueError, TypeError, IndexError: a shape, dtype or code does not fit.
        """
        self.check(codes, labels, condition)
        return self._network(self.embedding(codes).movedim(-1, 1), labels, self.condition_features(condition))

    def _network(self, x: Tensor, labels: Tensor | None, condition: Tensor | None) -> Tensor:
        raise NotImplementedError

    def condition_features(self, condition: Tensor | None) -> Tensor | None:
        """Codes of the level above -> spatial condition [B, condition_channels, H, W]; None for None."""
        return None if condition is None else self.condition_stack(condition)

    def spatial_inputs(self, features: Tensor | None, count: int, height: int, width: int) -> Tensor | None:
        """What the sampler's program reads at each position: [B, H, W, channels] float32, or None. features as
        above."""
        return None if features is None else features.detach().float().movedim(1, -1).contiguous()

    # ---- likelihood ----

    def loss(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood in nats per code, what training minimises. 0-d, float32 or wider."""
        return code_loss(self(codes, labels, condition), codes)

    @torch.no_grad()
    def log_prob(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Exact log p(codes | labels, condition) in nats: the sum over all positions. Shapes as `forward` -> [B]
        float64."""
        return -_cross_entropy(self(codes, labels, condition).double(), codes).sum((1, 2))

    def bits_per_code(self, codes: Tensor, labels: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Exact bits per code, - log2 p / (H W). Shapes as `forward` -> [B] float64; log2(K) for a uniform prior."""
        return -self.log_prob(codes, labels, condition) / (math.log(2) * codes.shape[1] * codes.shape[2])

    # ---- sampling ----

    def sample(self, count: int, height: int, width: int, **options) -> Tensor:
        """Draw codes [count, height, width]; see `vqfast.models.sampling.sample_codes` for the options."""
        from .sampling import sample_codes

        return sample_codes(self, count, height, width, **options)

    def program(self):
        """The network as a program of the incremental sampler; see `vqfast.models.sampling`."""
        raise NotImplementedError(f"{type(self).__name__} has no incremental sampler.")

    # ---- checks ----

    def check(self, codes: Tensor, labels: Tensor | None, condition: Tensor | None) -> None:
        name, c = type(self).__name__, self.config
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes are {list(codes.shape)} {codes.dtype}, {name} takes [B, H, W] int64.")
        batch, height, width = codes.shape
        _check_range("codes", codes, 0, c.codebook_size)
        if bool(c.classes) != (labels is not None):
            raise ValueError(
                f"this {name} has {c.classes} classes: labels must be {'given (-1 for none)' if c.classes else 'None'}."
            )
        if labels is not None:
            if labels.shape != (batch,) or labels.dtype != torch.int64:
                raise ValueError(
                    f"labels are {list(labels.shape)} {labels.dtype}; {batch} pictures need [{batch}] int64."
                )
            _check_range("labels", labels, -1, c.classes)
        if bool(c.condition_codes) != (condition is not None):
            what = (
                f"codes of the level above, [B, H / {c.condition_scale}, W / {c.condition_scale}]"
                if c.condition_codes
                else "None"
            )
            raise ValueError(f"this {name} needs condition = {what}.")
        if condition is not None:
            expected = (batch, height // c.condition_scale, width // c.condition_scale)
            if condition.shape != expected or height % c.condition_scale or width % c.condition_scale:
                raise ValueError(
                    f"condition is {list(condition.shape)}, codes are {list(codes.shape)}: with condition_scale"
                    f" {c.condition_scale} it must be {list(expected)}, and the scale must divide height and width."
                )
            _check_range("condition", condition, 0, c.condition_codes)


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean negative log-likelihood of codes [B, H, W] under logits [B, K, H, W], nats per code, float32 or wider."""
    return _cross_entropy(logits, codes).mean()


def _cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(dtype), codes, reduction="none")


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    # On a GPU the check would wait for the device; the embedding's own assertion guards there.
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most >= high:
        raise IndexError(f"{name} reach from {least} to {most}, they must be in {low}..{high - 1}.")


class HierarchicalPrior(nn.Module):
    """p(top) p(next | top) ... p(bottom | the level above it): one prior per level, in the model's order, finest first.

    Each prior but the coarsest is conditioned on the codes of the level above. The priors are trained separately,
    each on
    true codes, and used together here.

    Source: Razavi et al. 2019 (1906.00446), section 3.2.
    """

    def __init__(self, priors: Sequence[CodePrior]):
        super().__init__()
        self.priors = nn.ModuleList(priors)
        for below, above in zip(priors, priors[1:]):
            if below.config.condition_codes != above.config.codebook_size:
                raise ValueError(
                    f"a level has {above.config.codebook_size} codes, but the prior below it was built with condition_codes"
                    f" = {below.config.condition_codes}; they must be equal, priors given finest level first."
                )
        if not priors or priors[-1].config.condition_codes:
            raise ValueError(
                "the last prior is the coarsest level's, which has none above it: its condition_codes must be 0."
            )

    def log_prob(self, levels: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Exact log p of all levels in nats. Shapes: levels finest first, each [B, H, W] -> [B] float64."""
        if len(levels) != len(self.priors):
            raise ValueError(f"{len(levels)} levels of codes were given, this hierarchy has {len(self.priors)}.")
        return sum(
            prior.log_prob(codes, labels if prior.config.classes else None, above)
            for prior, codes, above in zip(self.priors, levels, [*levels[1:], None])
        )

    def bits_per_dim(self, levels: Sequence[Tensor], dims: int, labels: Tensor | None = None) -> Tensor:
        """Bits that the codes of a picture cost, per each of its `dims` = channels * height * width values. ->
        [B] float64."""
        return -self.log_prob(levels, labels) / (math.log(2) * dims)

    def sample(self, count: int, height: int, width: int, **options) -> list[Tensor]:
        """Draw all levels, finest first; height and width are the coarsest level's. Options as `sample_codes`;
        each level has its own noise."""
        labels, seed = options.pop("labels", None), options.pop("seed", 0)
        levels: list[Tensor] = []
        for depth, prior in enumerate(reversed(self.priors)):
            scale = prior.config.condition_scale if depth else 1
            height, width = height * scale, width * scale
            above = levels[0] if levels else None
            known = labels if prior.config.classes else None
            codes = prior.sample(
                count, height, width, condition=above, labels=known, seed=seed + depth * _LEVEL_SEED, **options
            )
            levels.insert(0, codes)
        return levels


_LEVEL_SEED = 0x9E3779B9


def image_bits_per_dim(
    model, prior: CodePrior | HierarchicalPrior, x: Tensor, labels: Tensor | None = None, scale: float | None = None
):
    """The bound -log2 p(x | codes) - log2 p(codes) per picture dimension, with a learned prior over the codes.

    Args:
        model: a VQVAE (one group) or VQVAE2; its likelihood scores the pictures exactly (see its `bits_per_dim`).
        prior: over the model's codes; several levels take a HierarchicalPrior.
        x: [B, C, H, W] pictures in [-0.5, 0.5].
        labels: for a prior with classes. scale: as `model.bits_per_dim`.

    Returns:
        BitsPerDim(total, reconstruction, latents), float64, mean over the batch.
    """
    reconstruction = model.bits_per_dim(x, scale).reconstruction
    levels = model.encode(x)
    log_prob = (
        prior.log_prob(levels, labels) if isinstance(prior, HierarchicalPrior) else prior.log_prob(*levels, labels)
    )
    latents = -log_prob.mean().to(reconstruction) / (math.log(2) * x[0].numel())
    return BitsPerDim(reconstruction + latents, reconstruction, latents)

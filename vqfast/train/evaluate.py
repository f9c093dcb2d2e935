"""How good a model is on pictures: errors, bits, code usage, and what JPEG and WebP make of as many bytes."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqfast.data import default_folder
from vqfast.models import (
    CodePrior,
    HierarchicalPrior,
    fit_logistic_scale,
    float_to_pixels,
    pad_to_multiple,
    pixels_to_float,
)
from vqfast.models.compression import compress_levels, stored_bytes
from vqfast.models.perceptual import LPIPS, FeatureStatistics, InceptionFeatures, frechet_distance
from vqfast.tokens import packed_bytes


class Codec(NamedTuple):
    """A file format of Pillow, and the pictures that it can hold."""

    name: str  # Pillow's
    lowest: int  # quality
    highest: int
    longest_side: int  # pixels
    options: dict


# 95 is the highest quality that Pillow's JPEG documentation advises; the sides are libjpeg's and libwebp's limits.
CODECS = (Codec("JPEG", 1, 95, 65_500, {"optimize": True}), Codec("WEBP", 0, 100, 16_383, {"method": 6}))
_BATCH_PIXELS = 1 << 18  # pictures of the same size go through the model together up to this many pixels


@dataclass
class Evaluation:
    """Means over pictures (not over pixels). Errors are of 8-bit pictures, scaled to [0, 1]."""

    pictures: int = 0
    mse: float = 0.0
    psnr: float = 0.0
    ssim: float | None = None
    lpips: float | None = None
    fid: float | None = None
    bits_per_dim: float | None = None
    perplexity: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)
    bits_per_pixel: float | None = None
    token_bytes: float | None = None
    notes: list[str] = field(default_factory=list)
    codecs: list[CodecResult] = field(default_factory=list)


@dataclass(frozen=True)
class CodecResult:
    """One codec at the quality whose files come nearest to the tokens' size."""

    name: str
    quality: int
    bytes: float
    too_large: bool  # even its lowest quality takes more bytes than the tokens
    mse: float
    psnr: float
    ssim: float | None
    lpips: float | None


class Closeness:
    """How near restored pictures are to the originals: means over pictures of the measures that this machine has.

    Args:
        perceptual: LPIPS too, when its weights are on this machine.
    """

    def __init__(self, perceptual: bool = False):
        self.ssim, self.lpips = similarity_function(), _lpips_function() if perceptual else None
        self._clear()

    def _clear(self) -> None:
        self.errors: list[float] = []
        self.ratios: list[float] = []
        self.similarities: list[float] = []
        self.distances: list[float] = []

    def fresh(self) -> Closeness:
        """The same measures (LPIPS' weights are shared), nothing seen yet."""
        other = copy.copy(self)
        other._clear()
        return other

    def add(self, pictures: Tensor, restored: Tensor) -> None:
        """uint8 [B, C, H, W], both."""
        error = squared_errors(pictures, restored)
        self.errors += error.tolist()
        self.ratios += psnr(error).tolist()
        self.similarities += self.ssim(pictures, restored) if self.ssim else []
        self.distances += self.lpips(pictures, restored) if self.lpips else []

    def means(self) -> dict[str, float | None]:
        """mse, psnr, ssim, lpips; None for what was not computed."""
        values = {"mse": self.errors, "psnr": self.ratios, "ssim": self.similarities, "lpips": self.distances}
        return {name: _mean(found) if found else None for name, found in values.items()}


def evaluate(
    model: torch.nn.Module,
    pictures: Iterable[Tensor],
    *,
    codecs: bool = True,
    likelihood: bool = True,
    perceptual: bool = False,
    fid: bool = False,
    prior: CodePrior | HierarchicalPrior | None = None,
) -> Evaluation:
    """Judges a model.

    Args:
        model: a VQ-VAE or VAE; it is put into eval mode.
        pictures: uint8 [C, H, W] of any sizes; they are padded to the model's stride and cut back. All are kept in
            memory when ``codecs`` asks for a second look at them.
        codecs: compare with JPEG and WebP.
        perceptual: compute LPIPS when its weights are on this machine.
        fid: compute FID; slow.
        likelihood: compute bits per dimension (needs sizes that are multiples of the stride).
        prior: count the bytes of the codes as `vqfast compress` writes them, not packed.

    Raises:
        ValueError: no pictures. ImportError: a prior without the entropy coder.
    """
    result, kept, near = Evaluation(), [], Closeness(perceptual)
    bits, token_bytes, pixels_seen = [], [], []
    counts = [torch.zeros(q.groups, q.codebook_size, dtype=torch.int64) for q in model.quantizers]
    scale, frechet = None, _Frechet() if fid else None
    for _, batch in same_size_batches(("", picture) for picture in pictures):
        restored, codes, x = restore(model, batch)
        near.add(batch, restored)
        if frechet is not None:
            frechet.add(batch, restored)
        for level, indices in enumerate(codes):
            for group, part in enumerate(indices.reshape(len(batch), len(counts[level]), -1).unbind(1)):
                counts[level][group] += torch.bincount(part.reshape(-1), minlength=counts[level].shape[1])
        if prior is not None:
            token_bytes += [stored_bytes(coded) for coded in compress_levels(prior, codes)]
        elif codes:
            token_bytes += [
                sum(packed_bytes(level.shape[1:], count.shape[1]) for level, count in zip(codes, counts, strict=True))
            ] * len(batch)
        pixels_seen += [batch.shape[2] * batch.shape[3]] * len(batch)
        if likelihood and batch.shape[2] % model.stride == 0 == batch.shape[3] % model.stride:
            if scale is None and model.likelihood.kind != "discretized_logistic":
                scale = _fitted_scale(model, x, result)
            bits += [float(model.bits_per_dim(x, scale=scale).total)] * len(batch)
        if codecs:
            kept += list(batch)
    if not near.errors:
        raise ValueError("there are no pictures to evaluate on")
    result.pictures = len(near.errors)
    for name, value in near.means().items():
        setattr(result, name, value)
    if near.ssim is None:
        result.notes.append("SSIM needs pytorch-msssim or torchmetrics: pip install pytorch-msssim")
    elif len(near.similarities) < len(near.errors):
        result.notes.append("SSIM leaves out pictures that are smaller than its window of 11 pixels")
    if perceptual and not near.distances:
        result.notes.append("LPIPS needs its weights (vqfast data metrics) and RGB pictures of 32 pixels or more")
    result.fid = frechet.distance() if frechet is not None else None
    if bits:
        result.bits_per_dim = _mean(bits)
    if counts:
        result.perplexity, result.usage = map(list, zip(*(_code_figures(count) for count in counts), strict=True))
        result.token_bytes, result.bits_per_pixel = _mean(token_bytes), 8 * sum(token_bytes) / sum(pixels_seen)
    if codecs and result.token_bytes:
        result.codecs = [codec_at(codec, kept, result.token_bytes, near) for codec in usable_codecs(kept, result.notes)]
    return result


@torch.no_grad()
def encode_pictures(model: torch.nn.Module, pixels: Tensor) -> tuple[list[Tensor] | Tensor, Tensor]:
    """The latents (codes per level, or a VAE's means) of uint8 pictures [B, C, H, W] of any size, and the padded
    input.
    """
    model.eval()
    x, _ = pad_to_multiple(pixels_to_float(pixels.to(next(model.parameters()).device)), model.stride)
    return model.encode(x), x


@torch.no_grad()
def restore(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Reconstruction (uint8) and codes of uint8 pictures [B, C, H, W] of any size, on the CPU, and the model's
    padded input.
    """
    latents, x = encode_pictures(model, pixels)
    out = float_to_pixels(model.decode(latents)[..., : pixels.shape[2], : pixels.shape[3]]).cpu()
    return out, [level.cpu() for level in latents] if model.quantizers else [], x


def same_size_batches(
    pictures: Iterable[tuple[str, Tensor]], limit: int = _BATCH_PIXELS
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and stacks of neighbouring pictures of one size, up to ``limit`` pixels together; order is kept."""
    names: list[str] = []
    waiting: list[Tensor] = []
    for name, picture in pictures:
        if waiting and (picture.shape != waiting[0].shape or (len(waiting) + 1) * picture[0].numel() > limit):
            yield names, torch.stack(waiting)
            names, waiting = [], []
        names.append(name)
        waiting.append(picture)
    if waiting:
        yield names, torch.stack(waiting)


def squared_errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each pair of uint8 pictures [B, C, H, W], on the scale [0, 1], float64 [B]."""
    return ((a.double() - b.double()) / 255).square().flatten(1).mean(1)


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: -10 log10(mse); identical pictures give 100."""
    return -10 * torch.log10(error.clamp_min(1e-10))


def similarity_function() -> Callable[[Tensor, Tensor], list[float]] | None:
    """SSIM of pairs of uint8 pictures by whichever library is installed, or None."""
    try:
        from pytorch_msssim import ssim
    except ImportError:
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure as measure
        except ImportError:
            return None

        def ssim(a, b, data_range, size_average):
            return measure(a, b, data_range=data_range, reduction="none")

    def similarity(a: Tensor, b: Tensor) -> list[float]:
        if min(a.shape[2:]) < 11:  # the window of the definition
            return []
        return ssim(a.float(), b.float(), data_range=255.0, size_average=False).reshape(len(a), -1).mean(1).tolist()

    return similarity


def _lpips_function() -> Callable[[Tensor, Tensor], list[float]] | None:
    """LPIPS of pairs of uint8 pictures, or None when its weights are not on this machine."""
    try:
        net = LPIPS.load(default_folder("metrics"), "alexnet")
    except FileNotFoundError:
        return None

    @torch.no_grad()
    def lpips(a: Tensor, b: Tensor) -> list[float]:
        if min(a.shape[2:]) < 32 or a.shape[1] != 3:  # what AlexNet can look at
            return []
        return net(pixels_to_float(a), pixels_to_float(b)).tolist()

    return lpips


class _Frechet:
    """FID of originals against reconstructions, gathered batch by batch."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; these published weights come in nothing else
            self._net = InceptionFeatures(default_folder("metrics"))
        self._sides = FeatureStatistics(), FeatureStatistics()

    def add(self, originals: Tensor, restored: Tensor) -> None:
        for side, pixels in zip(self._sides, (originals, restored), strict=True):
            for part in pixels.split(8):
                side.add(self._net(pixels_to_float(part).expand(-1, 3, -1, -1)))

    def distance(self) -> float:
        return frechet_distance(*self._sides)


def usable_codecs(pictures: list[Tensor], notes: list[str]) -> list[Codec]:
    """The codecs that this Pillow has and that hold all pictures [C, H, W]; a note for each of the others."""
    try:
        from PIL import features
    except ImportError:
        notes.append("the comparison with JPEG and WebP needs Pillow: pip install Pillow")
        return []
    found = []
    longest = max(max(picture.shape[1:]) for picture in pictures)
    for codec in CODECS:
        if not features.check({"JPEG": "jpg", "WEBP": "webp"}[codec.name]):
            notes.append(f"this Pillow was built without {codec.name}")
        elif longest > codec.longest_side:
            notes.append(
                f"{codec.name} is left out: it holds pictures of up to {codec.longest_side} pixels a side, and one here has {longest}"
            )
        else:
            found.append(codec)
    return found


def codec_at(codec: Codec, pictures: list[Tensor], target: float, measures: Closeness) -> CodecResult:
    """A codec at the one quality at which its average file comes nearest to ``target`` bytes.

    Bisection on the quality: files grow with it. The two qualities around the target are both tried.
    """
    name, low, high, _, options = codec
    sizes: dict[int, float] = {}

    def size(quality: int) -> float:
        if quality not in sizes:
            sizes[quality] = _mean([len(_compress(picture, name, quality, options)) for picture in pictures])
        return sizes[quality]

    least = size(low)
    while least < target and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    quality = low if least >= target else min((low, high), key=lambda q: abs(size(q) - target))
    near = measures.fresh()
    for picture in pictures:
        restored = _decompress(_compress(picture, name, quality, options), picture.shape[0])
        near.add(picture[None], restored[None])
    shown = "WebP" if name == "WEBP" else name
    return CodecResult(shown, quality, size(quality), least > target, **near.means())


def _compress(picture: Tensor, name: str, quality: int, options: dict) -> bytes:
    from PIL import Image

    array = picture.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, name, quality=quality, **options)
    return buffer.getvalue()


def _decompress(content: bytes, channels: int) -> Tensor:
    from PIL import Image

    array = np.array(Image.open(io.BytesIO(content)).convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def _code_figures(counts: Tensor) -> tuple[float, float]:
    """Perplexity exp(entropy) of the codes' frequencies, mean over groups, and the part of all codes that was used;
    counts [G, K].
    """
    p = counts.double() / counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(1)
    return float(entropy.exp().mean()), float((counts > 0).double().mean())


def _fitted_scale(model: torch.nn.Module, x: Tensor, result: Evaluation) -> float:
    """The scale of the logistic for models whose likelihood gives 8-bit levels no probability."""
    scale = fit_logistic_scale(model.decode(model.encode(x)), x)
    result.notes.append(
        f"bits/dim: this model has no likelihood of 8-bit pictures; a logistic of scale {scale:.4f}, fitted on "
        f"{len(x)} of these pictures, stands in"
    )
    return scale


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

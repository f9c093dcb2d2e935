"""Training an autoencoder on pictures."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import vqfast
from vqfast.models import pixels_to_float
from vqfast.train.config import Config, ConfigError, build_model
from vqfast.train.loop import Trainer, next_batch
from vqfast.train.report import SHOWN, draw_report, sample_pictures
from vqfast.train.sources import open_sources, skipped_lines


class PictureTrainer(Trainer):
    """Trains a VQ-VAE, VQ-VAE-2 or VAE on the pictures of [data]."""

    def _training_config(self) -> Config:
        """One codebook update per optimizer step, however many forwards that takes."""
        model = self.config.model
        if not hasattr(model, "auto_update"):
            return self.config
        return dataclasses.replace(self.config, model=dataclasses.replace(model, auto_update=False))

    def _open(self) -> None:
        self.sources = open_sources(self.config.data, self.config.model.in_channels)
        self.dataset = self.sources.train
        try:
            height, width = self.dataset[0].shape[1:]
            sample_pictures(self.sources.test, SHOWN)  # they are drawn much later, and said to be unreadable now
        except ValueError as error:
            raise ConfigError(str(error)) from None
        stride = self.model.stride
        if height % stride or width % stride:
            raise ConfigError(
                f"the training pictures have {width}x{height} pixels, but this model takes multiples of {stride}; set "
                f"data.size (--size) to {max(stride, min(height, width) // stride * stride)}, or model.stages to fewer"
            )

    def _begin(self) -> None:
        if self.config.train.init == "kmeans" and self.model.quantizers:
            self._init_codebooks()

    def _init_codebooks(self) -> None:
        """k-means on the latents of the first pictures, the same ones whatever happens later."""
        settings, data = self.config.train, self.config.data
        rounds = -(-settings.init_pictures // (data.batch_size * self.ranks.world_size))
        with self._loader(0) as batches:
            pixels = torch.cat([next_batch(batches) for _ in range(rounds)])
        try:
            self.model.init_codebooks_(pixels_to_float(pixels.to(self.ranks.device)))
        except ValueError as error:
            raise ConfigError(
                f'the codebook cannot start from k-means: {error}; raise train.init_pictures or set train.init = "none"'
            ) from None

    def _losses(self, pixels: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            out = self.forward(pixels_to_float(pixels))
        values = {"loss": out.loss, "reconstruction_loss": out.reconstruction_loss}
        if hasattr(out, "kl"):
            values["kl"] = out.kl
        for number, level in enumerate(out.levels):
            suffix = "" if len(out.levels) == 1 else f"_{number}"
            values |= {
                f"commitment_loss{suffix}": level.commitment_loss,
                f"perplexity{suffix}": level.perplexity,
                f"usage{suffix}": level.usage,
                f"nonfinite{suffix}": level.nonfinite,
            }
        return values

    def _updated(self) -> None:
        self.model.update_()

    def describe(self) -> list[str]:
        sizes = [f", {q.codebook_size} codes of {q.codebook_dim // q.groups} numbers" for q in self.model.quantizers]
        lines = [
            f"model      {self.config.kind}, {self.weights:,} weights" + "".join(sizes),
            f"data       {self.config.data.source}, {len(self.dataset):,} pictures, judged on {self.sources.test_name}",
        ]
        if self.model.quantizers:
            codebook = self.model.quantizers[0].codebook
            sample = torch.empty(1, codebook.shape[-1], device=codebook.device)
            lines += ["quantizer  " + vqfast.explain("nearest", sample, codebook).splitlines()[0]]
        return lines

    def remarks(self) -> list[str]:
        return skipped_lines(self.sources.train.skipped)

    def draw(self):
        return "reconstruction", draw_report(self.model, self.sources.test, self.log, self.folder, self.step)

    def exported(self) -> torch.nn.Module:
        model = build_model(self.config)
        model.load_state_dict(self.model.state_dict())
        return model

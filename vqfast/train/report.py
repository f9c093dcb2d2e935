"""The pictures of a run: originals over reconstructions, and charts of loss, perplexity and code usage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqfast.train.evaluate import restore
from vqfast.train.log import MetricsLog
from vqfast.train.plots import Chart, picture_grid, save_charts, save_picture

SHOWN = 8  # pictures in the grid


def draw_report(model: torch.nn.Module, dataset, log: MetricsLog, folder: Path, step: int):
    """Writes ``pictures/step-NNNNNN.png`` and ``plots/training.png`` and ``.svg``; returns the grid as a Pillow
    image.
    """
    pixels = sample_pictures(dataset, SHOWN)
    restored, codes, _ = restore(model, pixels)
    columns = min(4, max(1, 1500 // pixels.shape[3]))
    grid = picture_grid(
        [("original", channels_last(pixels)), ("reconstruction", channels_last(restored))], columns=columns
    )
    save_picture(grid, folder / "pictures" / f"step-{step:06d}.png")
    charts = [
        Chart(
            "loss",
            "step",
            {key.replace("_", " "): log.column(key) for key in ("loss", "reconstruction_loss")},
            log_y=True,
        )
    ]
    for title in ("perplexity", "usage"):
        keys = [key for key in (log.lines[-1] if log.lines else {}) if key.startswith(title)]
        if keys:
            charts.append(
                Chart(
                    title if title == "perplexity" else "code usage (part of all codes)",
                    "step",
                    {key.replace("_", " level "): log.column(key) for key in keys},
                )
            )
    if codes:
        charts.append(_code_chart(codes, [quantizer.codebook_size for quantizer in model.quantizers]))
    save_charts(charts, folder / "plots" / "training.svg")
    return grid


def _code_chart(codes: list[Tensor], sizes: list[int]) -> Chart:
    """How often each code was used in the pictures of the grid, most used first."""
    series = {}
    for level, (indices, size) in enumerate(zip(codes, sizes, strict=True)):
        counts = torch.bincount(indices.reshape(-1), minlength=size).sort(descending=True).values.numpy()
        series[f"level {level}"] = (np.arange(1, size + 1), counts)
    return Chart("uses of each code in the shown pictures", "codes, most used first", series, log_y=True)


def sample_pictures(dataset, number: int) -> Tensor:
    """``number`` pictures spread evenly over a data set (fewer when it is smaller), uint8 [n, C, H, W]."""
    number = min(number, len(dataset))
    return torch.stack([dataset[i * len(dataset) // number] for i in range(number)])


def channels_last(pixels: Tensor) -> np.ndarray:
    """uint8 [B, C, H, W] as a numpy array [B, H, W, C], as Pillow wants it."""
    return pixels.permute(0, 2, 3, 1).numpy()

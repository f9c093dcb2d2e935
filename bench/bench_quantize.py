"""The quantizer layer, against vector-quantize-pytorch's: a forward in evaluation, and a whole training step.

pytest bench/bench_quantize.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from _common import over, timed
from latents import LEVELS, load_residual_codes
from shapes import LATENTS, STEPS, Shape

import vqfast
from vqfast.cli._peers import LAYERS, indices_of, layers, training_step
from vqfast.cli.bench import check_layer

RESIDUAL = [Shape(LATENTS, 2048, 1024), Shape(LATENTS, 16_384, 1024)]


def prepared(shape, method, residual: bool = False):
    x, codebook = shape.load()
    if residual:
        codebook = load_residual_codes()
    made = layers(codebook)
    if method not in made:
        pytest.skip(f"{method} is not installed")
    check_layer(indices_of(made["vqfast"], x), x, codebook)
    return made[method], x


@over(STEPS, ["vqfast", LAYERS])
def bench_layer_forward(benchmark, shape, method):
    layer, x = prepared(shape, method)
    benchmark.group = "forward"
    timed(benchmark, lambda: indices_of(layer, x), shape)


@over(STEPS, ["vqfast", LAYERS])
def bench_layer_training_step(benchmark, shape, method):
    layer, x = prepared(shape, method)
    benchmark.group = "training step"
    timed(benchmark, lambda: training_step(layer, x), shape)


IMAGES = {
    "rows": lambda rows: rows.view(16, -1, rows.shape[1]),
    "channels-first": lambda rows: rows.view(16, -1, rows.shape[1]).transpose(1, 2).contiguous(),
    "channels-last": lambda rows: rows.view(16, -1, rows.shape[1]).transpose(1, 2),
    "bfloat16, channels-first": lambda rows: rows.bfloat16().view(16, -1, rows.shape[1]).transpose(1, 2).contiguous(),
}


@over([Shape(LATENTS, 16_384, 1024), Shape(LATENTS, 16_384, 8192)], IMAGES)
def bench_training_step_of_images(benchmark, shape, method):
    """The same rows in the layouts in which networks have them; a gradient in that layout arrives, and one leaves."""
    rows, codebook = shape.load()
    z = IMAGES[method](rows)
    layer = vqfast.nn.VectorQuantizerEMA(*codebook.shape[::-1], channel_dim=-1 if method == "rows" else 1, revive_below=0.01)
    layer.set_codebook_(codebook)
    if z.dtype == torch.float32:
        assert torch.equal(layer.encode(z).flatten(), vqfast.nearest(rows, codebook).indices)
    grad, one = torch.ones_like(z), torch.ones(())

    def step():
        out = layer(z.detach().requires_grad_())
        torch.autograd.backward([out.quantized, out.loss], [grad, one])

    benchmark.group = "training step of images"
    timed(benchmark, step, shape)


@over(RESIDUAL, ["vqfast", LAYERS])
def bench_residual_training_step(benchmark, shape, method):
    layer, x = prepared(shape, method, residual=True)
    benchmark.group = f"residual training step, {LEVELS} levels"
    timed(benchmark, lambda: training_step(layer, x), shape)

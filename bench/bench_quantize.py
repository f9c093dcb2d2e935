"""The quantizer layer, against vector-quantize-pytorch's: a forward in evaluation, and a whole training step.

pytest bench/bench_quantize.py --benchmark-only
"""

from __future__ import annotations

import pytest
from _common import over, timed
from latents import LEVELS, load_residual_codes
from shapes import LATENTS, STEPS, Shape

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


@over(RESIDUAL, ["vqfast", LAYERS])
def bench_residual_training_step(benchmark, shape, method):
    layer, x = prepared(shape, method, residual=True)
    benchmark.group = f"residual training step, {LEVELS} levels"
    timed(benchmark, lambda: training_step(layer, x), shape)

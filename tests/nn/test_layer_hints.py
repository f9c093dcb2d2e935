"""Layers remember order and basis of a large codebook; neither codes nor state show it (contract 1, 7)."""

import copy
import io
import pickle

import cases
import pytest
import torch
from check import same, same_bits
from layers import state_of

from vqfast.nn import VectorQuantizer, VectorQuantizerEMA, _hints

DIM, CODES, ROWS = 16, 2304, 4096
KINDS = pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizerEMA])
pytestmark = pytest.mark.quick


def plane(rows, seed):
    return cases.normal(rows, 4, seed=seed) @ cases.normal(4, DIM, seed=900) + 0.05 * cases.normal(rows, DIM, seed=seed + 1)


def layer_of(kind, **options):
    torch.manual_seed(0)
    layer = kind(DIM, CODES, **options).train()
    layer.set_codebook_(plane(CODES, 1))
    return layer


def searched(layer):
    """The codebook order that the layer remembers, or None."""
    return layer._hints._hints.order


@KINDS
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_a_layer_with_hints_learns_the_same_bits(kind, metric, monkeypatch):
    monkeypatch.setattr(_hints.HintKeeper, "STEPS", 3)
    hinted, plain = layer_of(kind, metric=metric), layer_of(kind, metric=metric)
    orders = set()
    for step in range(7):
        z = plane(ROWS, 10 + step) * (1 + step)  # the codebook moves far from the order that is remembered
        results = []
        for layer in (hinted, plain):
            monkeypatch.setattr(_hints.HintKeeper, "LEAST_CODES", 0 if layer is hinted else 10**9)
            results.append(layer(z))
            if kind is VectorQuantizer:
                results[-1].loss.backward()
                with torch.no_grad():
                    layer.codebook -= 100 * layer.codebook.grad
                    layer.codebook.grad = None
        same(results[0].indices, results[1].indices), same_bits(results[0].quantized, results[1].quantized)
        orders.add(searched(hinted).data_ptr())
    for name, tensor in state_of(hinted).items():
        same(tensor, state_of(plain)[name], name)
    assert len(orders) > 1 and searched(plain) is None, "hints were found anew, and only by the layer that may have them"


@KINDS
def test_what_replaces_the_codebook_forgets_the_hints(kind):
    layer = layer_of(kind)
    assert searched(layer) is None
    layer(plane(64, 30))
    assert searched(layer).shape == (1, CODES)
    layer.load_state_dict(layer_of(kind).state_dict())
    assert searched(layer) is None
    layer(plane(64, 30))
    layer.set_codebook_(plane(CODES, 2))
    assert searched(layer) is None


@KINDS
def test_copies_and_pickles_start_without_hints(kind):
    layer = layer_of(kind)
    layer(plane(64, 30))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)):
        assert searched(other) is None and searched(layer) is not None
        same(other.eval()(plane(64, 31)).indices, layer.eval()(plane(64, 31)).indices)
        assert searched(other) is not None
        layer.train()


@KINDS
def test_small_codebooks_and_graphs_have_no_hints(kind):
    small = kind(DIM, 64)
    small(plane(64, 30))
    assert searched(small) is None
    layer = layer_of(kind).eval()
    program = torch.export.export(layer, (plane(64, 30),))
    assert searched(layer) is None and "search_hints" not in program.graph_module.code


def test_a_transform_leaves_nothing_behind():
    layer = layer_of(VectorQuantizer).eval()
    codebooks, z = torch.stack([plane(CODES, 1), plane(CODES, 2)]), plane(64, 30)

    def indices(codebook):
        return torch.func.functional_call(layer, {"codebook": codebook}, (z,)).indices

    with torch.no_grad():
        found = torch.func.vmap(indices)(codebooks)
    assert searched(layer) is None
    same(found[0], indices(codebooks[0])), same(found[1], indices(codebooks[1]))

"""Layers remember order and basis of a large codebook; neither codes nor state show it (contract 1, 7)."""

import copy
import io
import pickle

import cases
import pytest
import torch
from check import same, same_bits
from layers import state_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vqfast import _backends
from vqfast.compat.vector_quantize_pytorch import VectorQuantize
from vqfast.nn import VectorQuantizer, VectorQuantizerEMA, _hints
from vqfast.ops import nearest

DIM, CODES, ROWS = 16, 4608, 4096
KINDS = pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizerEMA])
pytestmark = [pytest.mark.quick, pytest.mark.skipif(_backends.cpu_level() is None, reason="only the native CPU search has use for hints")]


def plane(rows, seed):
    return cases.normal(rows, 4, seed=seed) @ cases.normal(4, DIM, seed=900) + 0.05 * cases.normal(rows, DIM, seed=seed + 1)


def layer_of(kind, **options):
    groups = options.get("groups", 1)
    layer = kind(DIM * groups, CODES, **options).train()
    layer.set_codebook_(plane(CODES * groups, 1).view(layer.codebook.shape))
    return layer


def order_of(layer):
    """The codebook order that the layer remembers, or None."""
    return layer._hints._hints.order


def without(monkeypatch):
    monkeypatch.setattr(_hints.HintKeeper, "LEAST_CODES", 10**9)


@KINDS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_a_layer_with_hints_learns_the_same_bits(kind, metric, groups, monkeypatch):
    monkeypatch.setattr(_hints.HintKeeper, "STEPS", 3)
    monkeypatch.setattr(_hints.HintKeeper, "FAR", 1e9)  # however far the codebook moves
    hinted, plain = (layer_of(kind, metric=metric, groups=groups) for _ in range(2))
    assert _backends.search_counts(plane(ROWS, 10), plane(CODES, 1), metric).road == "panels"
    orders = []
    for step in range(7):
        z = plane(ROWS * groups, 10 + step).view(ROWS, -1) * (1 + step)
        results, encoded = [], []
        for layer in (hinted, plain):
            with monkeypatch.context() as patch:
                if layer is plain:
                    without(patch)
                encoded.append(layer.encode(z))
                results.append(layer(z))
            if kind is VectorQuantizer:
                results[-1].loss.backward()
                with torch.no_grad():
                    layer.codebook -= 100 * layer.codebook.grad
                    layer.codebook.grad = None
        same(results[0].indices, results[1].indices), same_bits(results[0].quantized, results[1].quantized), same(*encoded)
        orders.append(order_of(hinted))
    for name, tensor in state_of(hinted).items():
        same(tensor, state_of(plain)[name], name)
    assert orders[0] is not orders[-1] and order_of(plain) is None, "found anew, and only by the layer that may have hints"


@KINDS
def test_hints_are_found_anew_when_the_codebook_has_jumped(kind):
    layer = layer_of(kind).eval()
    z = plane(ROWS, 30)
    assert order_of(layer) is None
    layer(z)
    first = order_of(layer)
    for _ in range(2 * _hints.HintKeeper.STEPS):
        layer.encode(z)
    assert order_of(layer) is first, "nothing has moved"
    layer.load_state_dict(layer_of(kind).state_dict())
    layer(z)
    assert order_of(layer) is first, "the same codes"
    for change in (lambda: layer.set_codebook_(plane(CODES, 2)), lambda: layer.codebook.data.copy_(plane(CODES, 3))):
        change()
        before = order_of(layer)
        layer(z)
        assert order_of(layer) is not before
        wanted = nearest.nearest(z, layer.codebook).indices
        same(layer.encode(z), wanted)


@KINDS
def test_copies_and_pickles_start_without_hints(kind):
    layer = layer_of(kind)
    layer(plane(ROWS, 30))
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)):
        assert order_of(other) is None and order_of(layer) is not None
        same(other.eval()(plane(ROWS, 31)).indices, layer.eval()(plane(ROWS, 31)).indices)
        assert order_of(other) is not None
        layer.train()


@KINDS
def test_small_codebooks_few_rows_and_graphs_have_no_hints(kind):
    small = kind(DIM, 64)
    small(plane(ROWS, 30))
    assert order_of(small) is None
    layer = layer_of(kind).eval()
    layer(plane(900, 30))
    program = torch.export.export(layer, (plane(ROWS, 30),))
    with torch.no_grad():
        graph = make_fx(lambda z: layer(z).indices)(plane(ROWS, 30))
    assert order_of(layer) is None and "search_hints" not in program.graph_module.code + graph.code


@pytest.mark.parametrize("groups", [1, 2])
def test_modes_and_transforms_leave_nothing_behind(groups):
    layer = layer_of(VectorQuantizer, groups=groups).eval()
    codebooks, z = torch.stack([layer.codebook.data, layer.codebook.data.flip(-2)]), plane(ROWS * groups, 30).view(ROWS, -1)

    def indices(codebook):
        return torch.func.functional_call(layer, {"codebook": codebook}, (z,)).indices

    with torch.no_grad():
        found = torch.func.vmap(indices)(codebooks)
        torch.func.jvp(layer.encode, (z,), (z,))
    torch.func.grad(lambda x: layer.encode(x).double().sum() * 0 + x.sum())(z)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(ROWS, DIM * groups))
    assert order_of(layer) is None
    same(found[0], indices(codebooks[0])), same(found[1], indices(codebooks[1]))


def test_hints_found_in_inference_mode_serve_training():
    layer, z = layer_of(VectorQuantizerEMA), plane(ROWS, 30)
    with torch.inference_mode():
        layer.eval()(z)
    hint = order_of(layer)
    x = z.clone().requires_grad_()
    out = layer.train()(x)
    (out.loss + out.quantized.sum()).backward()
    assert order_of(layer) is hint and x.grad.isfinite().all()


def test_a_face_with_hints_finds_the_same_codes(monkeypatch):
    torch.manual_seed(0)
    face = VectorQuantize(dim=DIM, codebook_size=CODES, use_cosine_sim=True)
    z = plane(ROWS, 30)[None]
    found = face.eval()(z)[1]
    assert face._codebook._hints._hints.order is not None
    without(monkeypatch)
    same(found, face(z)[1])


@pytest.mark.parametrize("dim", [8, 16, 64, 130])
@pytest.mark.parametrize("codes", [4096, 9000])
def test_hints_are_asked_for_where_the_search_uses_them(codes, dim):
    """Up to some number of rows the search takes no panels, and layers hold no hints for it; from there on, on data like this, it does."""
    turn = cases.normal(4, dim, seed=901)
    codebook, rows = (
        cases.normal(n, 4, seed=seed) @ turn + 0.05 * cases.normal(n, dim, seed=seed + 1) for n, seed in ((codes, 902), (2100, 904))
    )
    layer = VectorQuantizer(dim, codes).train()
    layer.set_codebook_(codebook)
    wanted = [_backends.may_prune(n, codes, dim) for n in range(1, 2101)]
    first = wanted.index(True) + 1
    assert wanted == sorted(wanted) and 64 < first < 2100
    for count in (first - 1, first):
        assert (_backends.search_counts(rows[:count], codebook).road == "panels") == (count == first)
        layer(rows[:count])
        assert (order_of(layer) is not None) == (count == first)

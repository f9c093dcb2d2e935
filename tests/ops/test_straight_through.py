"""straight_through: the gradient of a quantizer step into its rows (contract 3, 8, 10, 11)."""

import cases
import pytest
import torch
from check import ULP, close, op, put, same_bits

import vqfast
from vqfast import _backends, _border
from vqfast.ops import straight_through

FAMILY = "straight_through"
BACKENDS = ("reference", "cpu")  # elsewhere it is plain torch
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the last rounding; float32 has none of its own
DTYPE = pytest.mark.parametrize("dtype", UNIT, ids=str)
pytestmark = pytest.mark.quick


def problem(dtype=torch.float32, *, groups=2, n=165, dim=9, codes=21):
    """grad, x [3, G, N, D] channels-first, codebook [G, K, D], indices [3, G, N] with masked ones."""
    grad, x = (cases.normal(3, groups, dim, n, seed=seed).to(dtype).transpose(2, 3) for seed in (1, 2))
    indices = (cases.normal(3, groups, n, seed=3).abs() * 1e4).long() % codes
    indices[:, :, ::7] = -1
    return grad, x, cases.normal(groups, codes, dim, seed=4).to(dtype), indices


def rows_of(codebook, indices, like):
    """Codes by index as rows in the layout of `like`; NaN where masked."""
    rows = codebook[torch.arange(codebook.shape[0])[None, :, None], indices.clamp(min=0)]
    return torch.empty_like(like).copy_(torch.where((indices >= 0)[..., None], rows, torch.nan))


def verify(backend, grad, x, codebook, indices, factor=0.375, by_rows=False):
    codes = rows_of(codebook, indices, x) if by_rows else codebook
    found = op("straight_through", backend)(*put(backend, grad, x, codes, indices), factor).cpu()
    assert found.dtype == x.dtype and found.stride() == torch.empty_like(x).stride()
    given = torch.where((indices >= 0)[..., None], torch.zeros_like(x) if grad is None else grad, 0).double()
    rest = (x.double() - rows_of(codebook, indices, x).double()).nan_to_num(0.0)
    finite = (x.float() - rows_of(codebook, indices, x).float()).isfinite().all(-1, keepdim=True)
    pull = torch.where(finite, factor * rest, 0.0)
    expected = given + pull
    # The difference, the product and the sum are rounded to float32, the sum then to x's type.
    close(found, expected, 2 * ULP * (2 * pull.abs() + expected.abs()) + UNIT[x.dtype] * 1.01 * expected.abs() + 2.0**-25 * (x.dtype == torch.float16))


@DTYPE
@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 64])
def test_channels_first(backend, dtype, by_rows, dim):
    verify(backend, *problem(dtype, dim=dim), by_rows=by_rows)


@DTYPE
@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
@pytest.mark.parametrize("dim", [1, 3, 64])
def test_rows(backend, dtype, by_rows, dim):
    grad, x, codebook, indices = problem(dtype, dim=dim)
    verify(backend, grad.contiguous(), x.contiguous(), codebook, indices, by_rows=by_rows)


@DTYPE
@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
@pytest.mark.parametrize("contiguous", [False, True], ids=["channels_first", "x_in_rows"])
@pytest.mark.parametrize("which", ["none", "one_value", "one_row", "value_of_each_row", "rows", "columns", "every_second"])
def test_gradients_that_lie_otherwise(backend, which, contiguous, by_rows, dtype):
    grad, x, codebook, indices = problem(dtype)
    spread = torch.zeros(3, 2, 165, 18, dtype=dtype)
    spread[..., ::2] = grad
    grads = {
        "none": None,
        "one_value": torch.tensor(0.5, dtype=dtype).expand(x.shape),
        "one_row": grad[:1, :1, :1].expand(x.shape),
        "value_of_each_row": grad[..., :1].expand(x.shape),
        "rows": grad.contiguous(),
        "columns": grad,
        "every_second": spread[..., ::2],
    }
    verify(backend, grads[which], x.contiguous() if contiguous else x, codebook, indices, by_rows=by_rows)


@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides(backend, view, by_rows):
    x = cases.views(cases.normal(2, 24, 9, seed=6))[view].unsqueeze(1)
    indices = torch.arange(48).view(2, 1, 24) % 13 - 1
    verify(backend, cases.normal(2, 1, 24, 9, seed=7), x, cases.normal(1, 12, 9, seed=8), indices, by_rows=by_rows)


@DTYPE
@pytest.mark.parametrize("contiguous", [False, True], ids=["channels_first", "rows"])
@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows_of_codes"])
def test_rows_that_do_not_count_take_the_gradient_alone(backend, dtype, contiguous, by_rows):
    """NaN and Inf, differences that overflow, and anything under a mask; the rows beside them are not touched."""
    grad, x, codebook, indices = problem(dtype)
    x[0, 0, 5, 3], x[1, 1, 70, 0], x[2, 0, 164] = torch.nan, torch.inf, -torch.inf
    x[0, 1, 7, 2], indices[0, 1, 7] = torch.nan, -1
    if dtype != torch.float16:
        x[1, 0, 66, 4], codebook[0, 2, 4], indices[1, 0, 66] = 3e38, -3e38, 2
    grad, x = (grad.contiguous(), x.contiguous()) if contiguous else (grad, x)
    verify(backend, grad, x, codebook, indices, by_rows=by_rows)


def test_the_same_bits_for_any_thread_count(backend, set_threads):
    grad, x, codebook, indices = put(backend, *problem(n=3000))
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(op("straight_through", backend)(grad, x, codebook, indices, 0.3))
    same_bits(found[0], found[1]), same_bits(found[0], found[2])


@pytest.mark.skipif(_backends.cpu_level() is None, reason="needs the native library")
@pytest.mark.parametrize("wrong", [-2, 21])
def test_an_index_out_of_range_reads_nothing_on_cpu(wrong):
    grad, x, codebook, indices = problem()
    indices[1, 1, 3] = wrong
    with pytest.raises(RuntimeError, match="an index lies outside -1..20"):
        op("straight_through", "cpu")(grad, x, codebook, indices, 1.0)


@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
def test_opcheck(backend, by_rows):
    grad, x, codebook, indices = problem(n=12)
    codes = torch.empty_like(x).copy_(x.flip(2)) if by_rows else codebook
    torch.library.opcheck(op("straight_through", backend), (grad, x, codes, indices, 0.5))
    torch.library.opcheck(op("straight_through", backend), (None, x.contiguous(), codes.contiguous(), indices, 0.5))


def test_no_rows(backend):
    grad, x, codebook, indices = problem(n=0)
    assert op("straight_through", backend)(*put(backend, grad, x, codebook, indices), 1.0).shape == x.shape


def test_it_is_plain_torch_where_it_is_differentiated(monkeypatch):
    """A gradient penalty goes through backward; then its ops are recorded."""
    ran, call = [], _border.call
    monkeypatch.setattr(_border, "call", lambda name, backend: ran.append(name) or call(name, backend))
    grad, x, codebook, indices = problem()
    x.requires_grad_()
    recorded = straight_through.straight_through(grad, x, codebook, indices, torch.tensor(0.5))
    assert recorded.requires_grad and "straight_through" not in ran
    with torch.no_grad():
        found = straight_through.straight_through(grad, x, codebook, indices, torch.tensor(0.5))
    close(found, recorded.double(), 4 * ULP * (1 + recorded.double().abs()))
    assert ("straight_through" in ran) == (_backends.cpu_level() is not None)


@DTYPE
@pytest.mark.parametrize("by_rows", [False, True], ids=["codebook", "rows"])
def test_difference_keeps_float32(dtype, by_rows):
    _, x, codebook, indices = problem(dtype)
    codes = rows_of(codebook, indices, x) if by_rows else codebook
    with torch.no_grad():
        found = straight_through.difference(x, codes, indices)
    expected = torch.where((indices >= 0)[..., None], x.float() - rows_of(codebook, indices, x).float(), 0.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spoilt", ["none", "nan", "masked", "overflow"])
def test_the_short_way_to_a_recorded_difference_changes_no_bit(spoilt, monkeypatch):
    """Where every row counts, nobody looks which do; where one does not, or where a sum of all rows overflows although each counts, one looks."""
    _, x, codebook, indices = problem()
    indices.clamp_(min=0)
    if spoilt == "nan":
        x[0, 0, 7, 3] = torch.nan
    if spoilt == "masked":
        indices[0, 0, 7] = -1
    if spoilt == "overflow":
        x[..., 0] = 3e38
    looked, all_finite = [], straight_through.all_finite
    monkeypatch.setattr(straight_through, "all_finite", lambda rest: looked.append(all_finite(rest)) or looked[-1])
    short = straight_through.difference(x.requires_grad_(), codebook, indices)
    assert short.requires_grad and looked == [spoilt in ("none", "masked")]
    monkeypatch.setattr(straight_through, "all_finite", lambda rest: False)
    same_bits(short, straight_through.difference(x, codebook, indices))


@DTYPE
def test_jacobians_and_batched_gradients(dtype):
    """torch.func and is_grads_batched run backward under vmap, on channels-first rows too."""
    x, codebook = cases.normal(2, 4, 3, seed=10).to(dtype).transpose(1, 2), cases.normal(6, 4, seed=11)

    def both(x):
        out = vqfast.vector_quantize(x, codebook)
        return out.quantized.float() + out.loss

    jacobian = torch.func.jacrev(both)(x)
    leaf = x.clone().requires_grad_()
    out = both(leaf)
    rows = [torch.autograd.grad(out.flatten()[i], leaf, retain_graph=True)[0] for i in range(out.numel())]
    close(jacobian.reshape(-1, *x.shape), torch.stack(rows).double(), 4 * UNIT[dtype] + 8 * ULP)
    batched = torch.autograd.grad(out, leaf, torch.eye(out.numel()).view(-1, *out.shape), is_grads_batched=True)[0]
    close(batched, torch.stack(rows).double(), 4 * UNIT[dtype] + 8 * ULP)


@pytest.mark.parametrize("through", ["quantized", "loss", "both"])
def test_tangents_go_through_backward(through):
    """Forward mode over reverse mode: a tangent of the upstream gradient is that of the gradient into x, never silently nothing."""
    x, codebook = cases.normal(5, 4, seed=14).requires_grad_(), cases.normal(6, 4, seed=15)
    weight, factor = cases.normal(5, 4, seed=16), torch.tensor(2.0)

    def gradient(weight, factor):
        out = vqfast.vector_quantize(x, codebook)
        parts = {"quantized": (out.quantized * weight).sum() + out.loss, "loss": out.loss * factor}
        return torch.autograd.grad(sum(parts.values()) if through == "both" else parts[through], x)[0]

    with torch.autograd.forward_ad.dual_level():
        duals = (torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in (weight, factor))
        tangent = torch.autograd.forward_ad.unpack_dual(gradient(*duals)).tangent
    moved = gradient(weight.double().float() + 1, factor + 1) - gradient(weight, factor)  # linear in both
    close(tangent, moved.double(), 32 * ULP * (1 + weight.abs()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a backend is wanted that cannot run")
def test_another_backend_that_is_asked_for_later_does_not_stop_backward():
    x, codebook = cases.normal(5, 4, seed=12).requires_grad_(), cases.normal(6, 4, seed=13)
    with vqfast.use_backend("cuda"):
        out = vqfast.vector_quantize(x, codebook, backend="cpu" if _backends.cpu_level() else "reference")
        (out.quantized.sum() + out.loss).backward()
    assert x.grad is not None

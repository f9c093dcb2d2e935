"""masked_conv and gate on the executor: the CPU backend's bits forward, derived bounds for the gradients, both thread
orders.
"""

import itertools

import cases
import pytest
import torch
from check import ULP, close, same, same_bits

import vqfast
from vqfast import reference_masked_conv as reference

SHAPES = [  # batch, in, out, height, width, kernel height, kernel width, dilation
    (2, 3, 5, 6, 7, 3, 3, 1),
    (1, 1, 1, 1, 1, 3, 3, 1),
    (1, 9, 130, 5, 4, 7, 7, 1),
    (1, 130, 7, 3, 50, 1, 3, 1),
    (1, 4, 6, 9, 2, 5, 3, 2),
    (3, 6, 12, 2, 3, 7, 5, 3),
    (1, 2, 3, 4, 5, 1, 1, 1),
    (3, 2, 4, 30, 15, 3, 3, 1),  # more than one range of positions
]
HALVES = (torch.float16, torch.bfloat16)


def data(shape, seed=0):
    """x, weight, bias, gradient of the output."""
    b, cin, cout, h, w, kh, kw, _ = shape
    sizes = ((b, cin, h, w), (cout, cin, kh, kw), (cout,), (b, cout, h, w))
    return [cases.normal(*size, seed=seed + i) for i, size in enumerate(sizes)]


def masks(shape):
    """(include_center, dilation, maps): masks A and B, one map and several where they divide the channels."""
    maps = [1] + [m for m in (2, 3) if shape[1] % m == 0 and shape[2] % m == 0]
    return [(center, shape[-1], m) for center, m in itertools.product((False, True), maps)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(executor, order, shape):
    x, weight, bias, _ = data(shape)
    for mask in masks(shape):
        got = executor.masked_conv(x, weight, bias, *mask)
        wide = [t.double() for t in (x, weight, bias)]
        expected, terms = (reference.masked_conv(*t, *mask) for t in (wide, [t.abs() for t in wide]))
        # A chain of n fused multiply-adds is off by at most n u sum |terms|; the bias is one more term.
        close(got, expected, (weight[0].numel() + 1) * ULP * terms, f"{mask}")
        if not vqfast._backends.reasons("masked_conv", "cpu", x):
            same(got, torch.ops.vqfast.masked_conv_cpu(x, weight, bias, *mask), f"the cpu backend's bits, {mask}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(executor, order, shape):
    x, weight, _, grad = data(shape)
    for mask in masks(shape):
        got = executor.masked_conv_backward(grad, x, weight, *mask, True, True)
        wide = [t.double() for t in (grad, x, weight)]
        expected, terms = (
            reference.masked_conv_backward(*t, *mask, True, True) for t in (wide, [t.abs() for t in wide])
        )
        for name, a, b, size in zip(("x", "weight"), got, expected, terms, strict=True):
            # Terms of a sum: (tap, output), or (picture, position); ranges are added without a rounding that counts.
            n = weight[:, 0].numel() if name == "x" else grad[:, 0].numel()
            close(a, b, (n + 1) * ULP * size, f"gradient to {name}, {mask}")
        only_x, nothing = executor.masked_conv_backward(grad, x, weight, *mask, True, False)
        same_bits(only_x, got[0])
        assert nothing.numel() == 0
        same_bits(executor.masked_conv_backward(grad, x, weight, *mask, False, True)[1], got[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision_is_taken_exactly_and_rounded_once(executor, order, shape, dtype):
    """Tensor cores: exact products, float32 sums of 16 terms at a time."""
    x, weight, bias, grad = (t.to(dtype) for t in data(shape))
    last = torch.finfo(dtype).eps / 2

    def check(got, expected, terms, n, what):
        assert got.dtype == dtype
        # A sum of n + 1 terms in groups, in float32; then one rounding to dtype, of a normal number or a subnormal one.
        float32 = (n + 1) * ULP * terms
        close(got, expected, float32 + last * (expected.abs() + float32) + torch.finfo(dtype).smallest_normal * last, what)

    for mask in masks(shape):
        wide = [t.double() for t in (x, weight, bias)]
        expected, terms = (reference.masked_conv(*t, *mask) for t in (wide, [t.abs() for t in wide]))
        check(executor.masked_conv(x, weight, bias, *mask), expected, terms, weight[0].numel() + 16, f"{mask}")
        wide = [t.double() for t in (grad, x, weight)]
        expected, terms = (
            reference.masked_conv_backward(*t, *mask, True, True) for t in (wide, [t.abs() for t in wide])
        )
        got = executor.masked_conv_backward(grad, x, weight, *mask, True, True)
        check(got[0], expected[0], terms[0], weight[:, 0].numel() + 16, f"gradient to x, {mask}")
        check(got[1], expected[1], terms[1], grad[:, 0].numel() + 16, f"gradient to weight, {mask}")


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_strides_change_nothing(executor, dtype):
    shape = (2, 3, 5, 6, 7, 3, 3, 1)
    x, weight, bias, grad = (t.to(dtype) for t in data(shape))

    def spread(t):  # every second element of a row that is NaN in between
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), torch.nan, dtype=dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    mask = (True, 1, 1)
    forward = executor.masked_conv(x, weight, bias, *mask)
    backward = executor.masked_conv_backward(grad, x, weight, *mask, True, True)
    for view in (lambda t: t.contiguous(memory_format=torch.channels_last), spread, lambda t: t.mT.contiguous().mT):
        same_bits(executor.masked_conv(view(x), view(weight), bias, *mask), forward)
        for a, b in zip(
            executor.masked_conv_backward(view(grad), view(x), view(weight), *mask, True, True), backward, strict=True
        ):
            same_bits(a, b)
    first = x[:1].expand(2, -1, -1, -1)
    same_bits(executor.masked_conv(first, weight, bias, *mask)[1], forward[0])


def test_masked_weights_are_not_read_and_get_zero(executor):
    shape = (2, 4, 6, 5, 6, 5, 3, 1)
    x, weight, bias, grad = data(shape)
    for mask in masks(shape):
        hidden = reference.causal_mask(weight, mask[0], mask[2]) == 0
        poisoned = weight.masked_fill(hidden, torch.nan)
        same_bits(executor.masked_conv(x, poisoned, bias, *mask), executor.masked_conv(x, weight, bias, *mask))
        got = executor.masked_conv_backward(grad, x, poisoned, *mask, True, True)
        same_bits(got[0], executor.masked_conv_backward(grad, x, weight, *mask, True, False)[0])
        assert not got[1][hidden].any() and got[1][~hidden].all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_a_batch_is_the_sum_of_its_pictures(executor, dtype):
    """The same bits for any split of the batch."""
    x, weight, bias, grad = (t.to(dtype) for t in data((5, 6, 7, 9, 4, 3, 3, 1)))
    mask = (False, 1, 1)
    whole = executor.masked_conv(x, weight, bias, *mask)
    same_bits(torch.cat([executor.masked_conv(x[b : b + 1], weight, bias, *mask) for b in range(5)]), whole)
    to_x = executor.masked_conv_backward(grad, x, weight, *mask, True, False)[0]
    parts = [
        executor.masked_conv_backward(grad[b : b + 1], x[b : b + 1], weight, *mask, True, False)[0] for b in range(5)
    ]
    same_bits(torch.cat(parts), to_x)


def test_nothing_to_do(executor):
    x, weight, bias, _ = data((2, 3, 5, 4, 3, 3, 3, 1))
    assert executor.masked_conv(x[:0], weight, bias, True, 1, 1).shape == (0, 5, 4, 3)
    to_x, to_weight = executor.masked_conv_backward(x.new_zeros(0, 5, 4, 3), x[:0], weight, True, 1, 1, True, True)
    assert to_x.shape == (0, 3, 4, 3) and to_weight.shape == weight.shape and not to_weight.any()
    point = weight[..., :1, :1]  # with mask A it sees nothing
    same_bits(executor.masked_conv(x, point, bias, False, 1, 1), bias[:, None, None].expand(2, 5, 4, 3))
    assert not executor.masked_conv(x, point, None, False, 1, 1).any()


@pytest.mark.unpoisoned
def test_offsets_beyond_two_to_the_31(executor):
    """Pictures, and channels, that lie 2^31 elements apart, in memory of which next to nothing is touched."""
    far = torch.empty((1 << 32) + 64, dtype=torch.bfloat16)
    near = cases.normal(3, 3, 2, 4, seed=1).bfloat16()
    weight = cases.normal(4, 3, 3, 3, seed=2).bfloat16()
    grad = cases.normal(3, 4, 2, 4, seed=3).bfloat16()
    for strides in ((1 << 31, 8, 4, 1), (8, 1 << 31, 4, 1)):
        x = far.as_strided((3, 3, 2, 4), strides).copy_(near)
        same_bits(executor.masked_conv(x, weight, None, True, 1, 1), executor.masked_conv(near, weight, None, True, 1, 1))
        args = (weight, True, 1, 1, True, True)
        for a, b in zip(
            executor.masked_conv_backward(grad, x, *args), executor.masked_conv_backward(grad, near, *args), strict=True
        ):
            same_bits(a, b)


@pytest.mark.parametrize("kind", [reference.TANH, reference.GLU])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_gate(executor, order, kind, dtype):
    x = 3 * cases.normal(2, 10, 4, 5, seed=3)
    x[0, :, 0, :3] = torch.tensor([0.0, 200.0, -200.0])
    grad, wide = cases.normal(2, 5, 4, 5, seed=5).to(dtype), cases.normal(2, 20, seed=4).to(dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    for vector in (None, wide[:, ::2]):
        exact = [t if t is None else t.double() for t in (x, vector)]
        size = exact[0].abs() + (0 if vector is None else exact[1].abs()[:, :, None, None])
        # Slopes are at most 1 (glu: |a|); the sum x + vector is rounded once, and some ten roundings follow.
        bound = 16 * ULP * (1 + size.max()) * max(1.0, grad.abs().max().item())
        step = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        expected = reference.gate(*exact, kind)
        close(executor.gate(x, vector, kind), expected, bound + step * expected.abs(), f"{kind}")
        expected = reference.gate_backward(grad.double(), *exact, kind)
        got = executor.gate_backward(grad, x, vector, kind)
        close(got, expected, bound * (1 + size.max()) + step * expected.abs(), f"gradient, {kind}")


def test_what_does_not_fit_is_refused_in_words(executor):
    x, weight, bias, grad = data((1, 3, 5, 4, 4, 3, 3, 1))
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        executor.masked_conv(x.double(), weight.double(), None, True, 1, 1)
    with pytest.raises(RuntimeError, match="x's channels and dtype"):
        executor.masked_conv(x.half(), weight, None, True, 1, 1)
    with pytest.raises(RuntimeError, match="odd"):
        executor.masked_conv(x, weight[..., :2], None, True, 1, 1)
    with pytest.raises(RuntimeError, match="bias must be"):
        executor.masked_conv(x, weight, bias[:4], True, 1, 1)
    with pytest.raises(RuntimeError, match="grad must be"):
        executor.masked_conv_backward(grad[:, :4], x, weight, True, 1, 1, True, True)
    with pytest.raises(RuntimeError, match="2 C"):
        executor.gate(x, None, 0)

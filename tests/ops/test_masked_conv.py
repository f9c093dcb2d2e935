"""masked_conv and gate: the plain masked convolution on every backend, causality, gradients, compiled graphs."""

import itertools

import pytest
import torch
from check import ULP, close, device_of, put, same_bits

import vqfast  # noqa: F401  (defines the ops)
from vqfast import reference_masked_conv as reference
from vqfast.ops.masked_conv import cropped_conv, gated_activation, masked_conv2d

pytestmark = pytest.mark.quick
FAMILY = "masked_conv"

SHAPES = [  # batch, in, out, height, width, kernel height, kernel width, dilation
    (2, 3, 5, 6, 7, 3, 3, 1),
    (1, 1, 1, 1, 1, 3, 3, 1),
    (2, 16, 70, 5, 4, 7, 7, 1),
    (1, 130, 64, 3, 100, 1, 3, 1),
    (1, 4, 65, 9, 2, 5, 3, 2),
    (3, 6, 12, 2, 3, 7, 5, 3),
    (1, 2, 3, 4, 5, 1, 1, 1),
]


def data(shape, dtype=torch.float32, seed=0):
    b, cin, cout, h, w, kh, kw, _ = shape
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return rand(b, cin, h, w), rand(cout, cin, kh, kw), rand(cout)


def masks(shape):
    maps = [1] + [m for m in (2, 3) if shape[1] % m == 0 and shape[2] % m == 0]
    return itertools.product("AB", maps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_convolution_with_a_multiplied_mask(backend, shape):
    x, weight, bias = data(shape)
    for mask, maps in masks(shape):
        args = (mask == "B", shape[-1], maps)
        expected = reference.masked_conv(x.double(), weight.double(), bias.double(), *args)
        # A sum of n products in any order is off by at most (n + 1) u sum |terms|, u half an ulp; bias is one
        # more term.
        terms = reference.masked_conv(x.double().abs(), weight.double().abs(), bias.double().abs(), *args)
        n = weight[0].numel() + 1
        got = masked_conv2d(*put(backend, x, weight, bias), mask=mask, dilation=shape[-1], maps=maps, backend=backend)
        close(got, expected, (n + 1) * ULP * terms, f"mask {mask}, {maps} maps")
        close(cropped_conv(x.double(), weight.double(), bias.double(), *args), expected, 1e-13 * terms + 1e-300)


def test_no_bias_empty_batch_and_strides(backend):
    x, weight, _ = data(SHAPES[0])
    x, weight = put(backend, x, weight)
    expected = masked_conv2d(x, weight, backend=backend)
    channels_last = x.to(memory_format=torch.channels_last)
    close(masked_conv2d(channels_last, weight, backend=backend), expected, 1e-5)
    wide = torch.empty(*x.shape[:3], 2 * x.shape[3], device=x.device).fill_(torch.nan)
    wide[..., ::2] = x
    close(masked_conv2d(wide[..., ::2], weight, backend=backend), expected, 1e-5)
    assert masked_conv2d(x[:0], weight, backend=backend).shape == (0, 5, 6, 7)


@pytest.mark.parametrize("way", ["every_second", "expanded"])
def test_strides_of_bias(backend, way):
    x, weight, bias = put(backend, *data(SHAPES[0]))
    poisoned = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)
    bias = poisoned[:, 0] if way == "every_second" else bias[:1].expand(5)
    assert not bias.is_contiguous()
    expected = masked_conv2d(x, weight, bias.contiguous(), backend=backend)
    same_bits(masked_conv2d(x, weight, bias, backend=backend), expected)


def test_masked_weights_are_not_read(backend):
    x, weight, bias = data(SHAPES[0])
    for mask in "AB":
        hidden = reference.causal_mask(weight, mask == "B", 1) == 0
        poisoned = weight.masked_fill(hidden, 1e30)
        if backend == "reference":
            continue  # it multiplies them by zero, which is its meaning
        got = [masked_conv2d(*put(backend, x, w, bias), mask=mask, backend=backend) for w in (weight, poisoned)]
        same_bits(*got)


@pytest.mark.parametrize("mask", "AB")
@pytest.mark.parametrize("maps", [1, 2])
def test_causality_by_gradient(backend, mask, maps):
    """d y[map g, i, j] / d x is zero at and after (i, j) in raster order, up to the mask's own centre rule, and
    nonzero before."""
    x, weight, bias = data((1, 4, 4, 5, 5, 5, 5, 1))
    x, weight, bias = put(backend, x, weight, bias)
    for g, i, j in itertools.product(range(maps), range(5), range(5)):
        x = x.detach().requires_grad_()
        y = masked_conv2d(x, weight, bias, mask=mask, maps=maps, backend=backend)
        y[0, g * 4 // maps : (g + 1) * 4 // maps, i, j].sum().backward()
        seen = (x.grad.view(maps, 4 // maps, 5, 5).abs().amax(1) > 0).cpu()
        x.grad = None
        for h, a, b in itertools.product(range(maps), range(5), range(5)):
            inside = abs(a - i) <= 2 and abs(b - j) <= 2
            before = (a, b) < (i, j) or ((a, b) == (i, j) and (h < g or (h == g and mask == "B")))
            assert seen[h, a, b] == (inside and before), (g, i, j, h, a, b)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[6]], ids=str)
def test_gradcheck(shape):
    for mask, maps in masks(shape):
        inputs = [
            t.requires_grad_() for t in data((shape[0], min(shape[1], 6), min(shape[2], 6), *shape[3:]), torch.float64)
        ]
        if inputs[0].shape[1] % maps or inputs[1].shape[0] % maps:
            continue
        torch.autograd.gradcheck(
            lambda *t, mask=mask, maps=maps: masked_conv2d(*t, mask=mask, dilation=shape[-1], maps=maps),
            inputs,
            fast_mode=True,
        )


def test_float32_gradient_equals_the_float64_one(backend):
    shape = (2, 8, 12, 6, 5, 3, 3, 1)
    x, weight, bias = data(shape)
    seed = torch.randn(2, 12, 6, 5, generator=torch.Generator().manual_seed(1))
    for mask, maps in masks(shape):
        grads = []
        for dtype, where in ((torch.float64, "reference"), (torch.float32, backend)):
            leaves = [t.to(dtype).to(device_of(where)).detach().requires_grad_() for t in (x, weight, bias)]
            y = masked_conv2d(*leaves, mask=mask, maps=maps, backend=where)
            grads.append(torch.autograd.grad(y, leaves, seed.to(y)))
        for got, expected in zip(grads[1], grads[0]):
            close(got, expected, 300 * ULP * expected.abs().max().item(), f"mask {mask}, {maps} maps")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_the_gradient_of_the_full_convolution(backend, shape):
    """Both gradients by the op itself: on a CPU the autograd Function would take the cpu backend's."""
    x, weight, _ = data(shape)
    grad = torch.randn(shape[0], shape[2], *shape[3:5], generator=torch.Generator().manual_seed(2))
    backward = getattr(torch.ops.vqfast, f"masked_conv_backward_{backend}")
    for mask, maps in masks(shape):
        args = (mask == "B", shape[-1], maps, True, True)
        wide = [t.double() for t in (grad, x, weight)]
        expected, terms = (reference.masked_conv_backward(*t, *args) for t in (wide, [t.abs() for t in wide]))
        got = backward(*put(backend, grad, x, weight), *args)
        for name, a, b, size in zip(("x", "weight"), got, expected, terms):
            # Sums of n products as in the forward pass: over (tap, out channel), over (picture, position).
            n = weight[:, 0].numel() if name == "x" else grad[:, 0].numel()
            close(a, b, (n + 1) * ULP * size, f"gradient to {name}, mask {mask}, {maps} maps")
        only_x, nothing = backward(*put(backend, grad, x, weight), *args[:3], True, False)
        same_bits(only_x, got[0])
        assert nothing.numel() == 0
        same_bits(backward(*put(backend, grad, x, weight), *args[:3], False, True)[1], got[1])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[6]], ids=str)
def test_gradient_of_the_gradient(shape):
    for mask, maps in masks(shape):
        x, weight, _ = data((1, min(shape[1], 4), 2 * maps, 3, 2, *shape[5:]), torch.float64)
        if x.shape[1] % maps:
            continue
        torch.autograd.gradgradcheck(
            lambda a, b, mask=mask, maps=maps: masked_conv2d(a, b, mask=mask, dilation=shape[-1], maps=maps),
            (x.requires_grad_(), weight.requires_grad_()),
            fast_mode=True,
        )


def test_same_bits_for_any_batch_split_and_thread_count(set_threads):
    if vqfast._backends.reasons("masked_conv", "cpu", torch.empty(0)):
        pytest.skip("native: no native library")
    x, weight, bias = data((5, 20, 70, 9, 11, 3, 3, 1))
    set_threads(1)
    whole = masked_conv2d(x, weight, bias, backend="cpu")
    set_threads(2)
    same_bits(masked_conv2d(x, weight, bias, backend="cpu"), whole)
    same_bits(torch.cat([masked_conv2d(x[b : b + 1], weight, bias, backend="cpu") for b in range(5)]), whole)


@pytest.mark.parametrize("count", [1, 2], ids="{} threads".format)
def test_subnormals_count_although_torch_flushes_them(backend, count, set_threads):
    if backend != "cpu" or not torch.set_flush_denormal(False):
        pytest.skip("the other backends compute with torch itself, which does as the user asked")
    border = torch.ops.vqfast
    x, weight = torch.full((8, 4, 16, 16), 2.0**-140), torch.full((4, 4, 1, 1), 0.5)
    grad = x[:, :2].clone()

    def results():
        yield border.masked_conv_cpu(x, weight, None, True, 1, 1)
        for kind in (0, 1):
            yield border.gate_cpu(x, None, kind)
            yield border.gate_backward_cpu(grad, x, None, kind)

    set_threads(count)
    wanted = list(results())
    assert (wanted[0] == 2.0**-139).all() and all((y > 0).any() for y in wanted[2:])
    torch.set_flush_denormal(True)
    try:
        got = list(results())
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(got, wanted):
        same_bits(a, b)


# ---- gate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tanh", "glu"])
@pytest.mark.parametrize("with_vector", [False, True])
def test_gate_equals_its_formula(backend, kind, with_vector):
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(3, 10, 4, 5, generator=generator)
    x[0, :, 0, :3] = torch.tensor([0.0, 200.0, -200.0])
    vector = torch.randn(3, 10, generator=generator) if with_vector else None
    seed = torch.randn(3, 5, 4, 5, generator=generator)
    results = []
    for dtype, where in ((torch.float64, "reference"), (torch.float32, backend)):
        leaf = x.to(dtype).to(device_of(where)).requires_grad_()
        extra = None if vector is None else vector.to(leaf).detach().requires_grad_()
        y = gated_activation(leaf, extra, kind=kind, backend=where)
        results.append((y, *torch.autograd.grad(y, [leaf] + [extra] * with_vector, seed.to(y))))
    size = x.abs() + (0 if vector is None else vector.abs()[:, :, None, None])
    # tanh(a) sigmoid(b) has slopes at most 1: the rounded sum x + vector moves it by ulp * size, the formula
    # itself adds
    # some ten roundings of numbers at most 1 (glu: at most |a|).
    bound = ULP * (16 + 16 * size.amax())
    for got, expected in zip(results[1], results[0]):
        close(got, expected, bound * 8 * max(1.0, seed.abs().max().item()) * (20 if got.dim() == 2 else 1), kind)


@pytest.mark.parametrize("kind", ["tanh", "glu"])
def test_gate_gradcheck(kind):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 6, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: gated_activation(a, b, kind=kind), (x, vector))


# ---- graphs and errors -------------------------------------------------------------------------------------


def test_opcheck(backend):
    x, weight, bias = (t.requires_grad_() for t in put(backend, *data((2, 4, 6, 5, 4, 3, 3, 1))))
    conv = getattr(torch.ops.vqfast, f"masked_conv_{backend}")
    torch.library.opcheck(conv, (x, weight, bias, True, 1, 2))
    torch.library.opcheck(conv, (x.detach(), weight.detach(), None, False, 2, 1))
    backward = getattr(torch.ops.vqfast, f"masked_conv_backward_{backend}")
    grad = torch.ones(2, 6, 5, 4, device=x.device)
    torch.library.opcheck(backward, (grad, x, weight, True, 1, 2, True, True))
    torch.library.opcheck(backward, (grad, x.detach(), weight.detach(), False, 1, 1, True, False))
    gate = getattr(torch.ops.vqfast, f"gate_{backend}")
    torch.library.opcheck(gate, (x, torch.ones(2, 4, device=x.device, requires_grad=True), 0))
    torch.library.opcheck(gate, (x.detach(), None, 1))


def test_compiles_to_one_graph_with_the_same_gradient(backend):
    x, weight, bias = put(backend, *data((2, 4, 6, 5, 4, 3, 3, 1)))

    def step(x, weight, bias):
        return gated_activation(masked_conv2d(x, weight, bias, backend=backend), backend=backend).square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results):
        close(got, expected, 1e-5 * expected.detach().abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(mask="C"), ValueError, "centre hidden"),
        (dict(dilation=0), ValueError, "at least 1"),
        (dict(maps=2), ValueError, "divide"),
        (dict(weight=torch.zeros(5, 3, 2, 3)), ValueError, "odd"),
        (dict(weight=torch.zeros(5, 4, 3, 3)), ValueError, "same Cin"),
        (dict(weight=torch.zeros(5, 3, 3, 3, dtype=torch.float64)), TypeError, "one floating dtype"),
        (dict(bias=torch.zeros(4)), ValueError, "Cout"),
    ],
    ids=lambda v: "",
)
def test_errors_say_what_is_wrong(change, error, says):
    arguments = dict(x=torch.zeros(1, 3, 4, 4), weight=torch.zeros(5, 3, 3, 3), bias=torch.zeros(5)) | change
    with pytest.raises(error, match=says):
        masked_conv2d(**arguments)


def test_gate_errors():
    with pytest.raises(ValueError, match="2 C"):
        gated_activation(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="kind"):
        gated_activation(torch.zeros(1, 2, 2, 2), kind="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
def test_gate_backward_refuses_a_gradient_that_it_would_misread(dtype):
    """A float16 gradient read as float32 would be read past its end."""
    if vqfast._backends.reasons("masked_conv", "cpu", torch.empty(0)):
        pytest.skip("native: no native library")
    with pytest.raises(RuntimeError, match="grad must be float32"):
        torch.ops.vqfast.gate_backward_cpu(torch.ones(1, 2, 8, 8, dtype=dtype), torch.ones(1, 4, 8, 8), None, 0)

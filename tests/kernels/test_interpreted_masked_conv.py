"""masked_conv and gate on Triton, in Triton's interpreter: tile borders, dtypes, strides, runs of the weight gradient.

tests/ops/test_masked_conv.py runs the op suite on the same kernels; here are the shapes that their tiles could get wrong.
"""

import importlib

import pytest
import torch
from check import ULP, close, run_python, same_bits

from vqfast import _backends
from vqfast import reference_masked_conv as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_ULP = {torch.float32: ULP, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # largest relative error of one rounding


@pytest.fixture(autouse=True)
def triton_exists():
    reason = "; ".join(_backends.reasons("masked_conv", "triton", torch.empty(0, device=DEVICE)))
    if reason:
        pytest.skip(f"triton: {reason}")


def kernels():
    return importlib.import_module("vqfast.kernels.masked_conv")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x, weight, bias, *mask):
    """Forward pass and both gradients against float64, within the bound of a float32 sum in any order and one rounding."""
    b, _, h, w = x.shape
    grad = normal(b, len(weight), h, w, seed=9, dtype=x.dtype)
    step = HALF_ULP[x.dtype]
    inputs = [t.to(DEVICE) for t in (grad, x, weight)]
    got = [kernels().masked_conv_triton(inputs[1], inputs[2], None if bias is None else bias.to(DEVICE), *mask),
           *kernels().masked_conv_backward_triton(*inputs, *mask, True, True)]  # fmt: skip
    results = []
    for size in (lambda t: t, torch.Tensor.abs):
        wide = [None if t is None else size(t.double()) for t in (grad, x, weight, bias)]
        results.append([reference.masked_conv(*wide[1:], *mask), *reference.masked_conv_backward(*wide[:3], *mask, True, True)])
    counts = weight[0].numel() + 1, weight[:, 0].numel(), grad[:, 0].numel()
    for name, a, value, terms, n in zip(("y", "gradient to x", "gradient to weight"), got, *results, counts):
        assert a.dtype == x.dtype and a.is_contiguous()
        # 2^-24: what is below the smallest half.
        close(a.double(), value, (n + 1) * ULP * terms + (step * value.abs() + 2.0**-24 if step > ULP else 0.0), f"{name} {mask}")
    return got


@pytest.mark.parametrize(
    "shape, mask",
    [
        ((2, 33, 17, 5, 9, 3, 3), (True, 1, 1)),  # channels just over a tile's step
        ((1, 65, 129, 2, 2, 3, 3), (False, 1, 1)),  # and just over a tile
        ((3, 6, 6, 4, 3, 5, 5), (True, 1, 3)),  # the centre's channel mask
        ((3, 6, 6, 4, 3, 5, 5), (False, 1, 3)),
        ((2, 3, 20, 9, 8, 7, 7), (False, 1, 1)),  # a first layer
        ((2, 4, 4, 3, 5, 3, 5), (True, 4, 1)),  # taps further apart than the map is wide
        ((1, 5, 5, 1, 40, 1, 7), (True, 1, 1)),  # a map of one row, a kernel of one row
        ((1, 5, 5, 40, 1, 7, 1), (True, 1, 1)),  # of one column
        ((300, 2, 2, 1, 1, 3, 3), (True, 1, 2)),  # pictures of one position
        ((2, 4, 3, 3, 3, 1, 1), (False, 1, 1)),  # a kernel that sees nothing
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tile_border(shape, mask, dtype):
    b, cin, cout, h, w, kh, kw = shape
    check(normal(b, cin, h, w, dtype=dtype), normal(cout, cin, kh, kw, seed=1, dtype=dtype), normal(cout, seed=2, dtype=dtype), *mask)


@pytest.mark.parametrize("programs", [1, 40, 10_000])
def test_runs_of_the_weight_gradient(monkeypatch, programs):
    """One run, several, and as many as positions allow; the last one is short."""
    module = kernels()
    monkeypatch.setattr(module._tuning, "CONV_PROGRAMS", programs)
    x, weight = normal(3, 3, 30, 29), normal(4, 3, 3, 3, seed=1)
    _, _, first = check(x, weight, None, True, 1, 1)
    same_bits(check(x, weight, None, True, 1, 1)[2], first)


def test_any_strides():
    """Channels last, every second column, an expanded batch: the same bits as from contiguous inputs."""
    module, weight = kernels(), normal(5, 6, 3, 3, seed=1).to(DEVICE)
    x, grad = normal(3, 6, 4, 7).to(DEVICE), normal(3, 5, 4, 7, seed=2).to(DEVICE)
    x[1:] = x[:1]
    expected = module.masked_conv_triton(x, weight, None, True, 1, 1)
    gradients = module.masked_conv_backward_triton(grad, x, weight, True, 1, 1, True, True)
    apart = torch.full((3, 6, 4, 14), torch.nan, device=DEVICE)[..., ::2].copy_(x)
    for other in (x.to(memory_format=torch.channels_last), apart, x[:1].expand_as(x), x.mT.contiguous().mT):
        same_bits(module.masked_conv_triton(other, weight, None, True, 1, 1), expected)
        found = module.masked_conv_backward_triton(
            grad.to(memory_format=torch.channels_last), other, weight.mT.contiguous().mT, True, 1, 1, True, True
        )
        for a, b in zip(found, gradients):
            same_bits(a, b)


@pytest.mark.parametrize("kind", [reference.TANH, reference.GLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 34, 9, 8), (1, 2, 1, 1), (3, 6, 1, 65)], ids=str)
def test_gate_in_every_dtype_and_layout(kind, dtype, shape):
    module = kernels()
    x, vector = normal(*shape, dtype=dtype).to(DEVICE) * 4, normal(*shape[:2], seed=1, dtype=dtype).to(DEVICE)
    x[0, :, 0, 0] = 300.0
    grad = normal(shape[0], shape[1] // 2, *shape[2:], seed=2, dtype=dtype).to(DEVICE)
    for bias in (None, vector, vector.mT.contiguous().mT):
        wide = x.double(), None if bias is None else bias.double()
        expected = reference.gate(*wide, kind), reference.gate_backward(grad.double(), *wide, kind)
        # Two exponentials, two quotients and some products, each within 2^-22 of numbers up to 1 (glu: |a|) and grad.
        size = 1 if kind == reference.TANH else 1 + x.double().abs().amax() + vector.double().abs().amax()
        error = 2.0**-19 * size * (1 + grad.double().abs().amax())
        apart = torch.empty(*shape[:3], 2 * shape[3], dtype=dtype, device=DEVICE)[..., ::2].copy_(x)
        for other in (x, x.to(memory_format=torch.channels_last), apart, x.mT.contiguous().mT):
            got = module.gate_triton(other, bias, kind), module.gate_backward_triton(grad.mT.contiguous().mT, other, bias, kind)
            for a, value in zip(got, expected):
                assert a.dtype == dtype and a.is_contiguous()
                close(a.double(), value.cpu(), error.cpu() + HALF_ULP[dtype] * value.cpu().abs() + 2.0**-24)


def test_empty_inputs():
    module, weight = kernels(), normal(4, 6, 3, 3).to(DEVICE)
    x, grad = torch.empty(0, 6, 4, 4, device=DEVICE), torch.empty(0, 4, 4, 4, device=DEVICE)
    assert module.masked_conv_triton(x, weight, None, True, 1, 1).shape == (0, 4, 4, 4)
    grad_x, grad_weight = module.masked_conv_backward_triton(grad, x, weight, True, 1, 1, True, True)
    assert grad_x.shape == x.shape and not grad_weight.any() and grad_weight.shape == weight.shape
    assert module.gate_triton(x, None, 0).shape == (0, 3, 4, 4)


BEYOND_32_BITS = """
import torch
from vqfast.kernels import masked_conv as module

def far(shape, axis):
    # One axis, of 6, with a stride of 2^29 elements: 12 GiB of addresses, a few pages of memory.
    strides = list(torch.empty(shape).stride())
    strides[axis] = 2**29
    return torch.empty(shape[axis] * 2**29).as_strided(shape, strides)

weight, bias = torch.randn(6, 6, 3, 3), torch.randn(6)
x, grad = torch.randn(6, 6, 6, 6), torch.randn(6, 6, 6, 6)
expected = module.masked_conv_triton(x, weight, bias, True, 1, 1)
gradients = module.masked_conv_backward_triton(grad, x, weight, True, 1, 1, True, True)
gate = module.gate_triton(x, None, 0), module.gate_backward_triton(grad[:, :3], x, None, 0)
for axis in range(4):
    other = far(x.shape, axis).copy_(x)
    other_grad = far(grad.shape, axis).copy_(grad)
    assert torch.equal(module.masked_conv_triton(other, weight, bias, True, 1, 1), expected), axis
    found = module.masked_conv_backward_triton(other_grad, other, weight, True, 1, 1, True, True)
    assert all(map(torch.equal, found, gradients)), axis
    assert torch.equal(module.gate_triton(other, None, 0), gate[0]), axis
    assert torch.equal(module.gate_backward_triton(other_grad[:, :3], other, None, 0), gate[1]), axis
"""


@pytest.mark.unpoisoned
def test_strides_beyond_32_bits():
    """In a process of its own: a wrapped offset may end it."""
    if DEVICE == "cuda":
        pytest.skip("nowhere: bench/gpu_check.py tests sizes beyond 2^31 on a GPU")
    run_python(BEYOND_32_BITS, timeout=300, OMP_NUM_THREADS="1")

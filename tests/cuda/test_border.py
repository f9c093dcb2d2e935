"""The compiled CUDA registrations, on the executor, honour the border: schemas, fakes with true strides, gradients
through the op.
"""

import cases
import pytest
import torch
from check import close, same

from vqfast import _backends, _border, reference
from vqfast.ops.residual import _residual_cuda

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def arguments() -> dict[str, tuple]:
    image = cases.normal(2, 6, 5, 1, seed=1).permute(0, 3, 2, 1)  # [B, G, N, D], channels first in memory
    codebook = cases.normal(1, 7, 6, seed=2)
    indices = torch.tensor([[[0, 3, -1, 6, 2]], [[1, 1, 5, 0, 4]]])
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    picture, weight, bias = cases.normal(2, 4, 5, 3, seed=3), cases.normal(6, 4, 3, 3, seed=4), cases.normal(6, seed=5)
    after = cases.normal(2, 6, 5, 3, seed=6)
    return {
        "nearest": (image, codebook, 0, None, None, None),
        "gather": (codebook, indices),
        "code_stats": (image, indices, 7),
        "quantize": (image, codebook, mask, 1, True, None, None, None),
        "masked_conv": (picture, weight, bias, True, 1, 2),
        "masked_conv_backward": (after, picture, weight, False, 2, 1, True, True),
        "gate": (picture.permute(0, 1, 3, 2), bias[:4].expand(2, 4), 0),
        "gate_backward": (picture[:, :2], picture, None, 1),
    }


@pytest.mark.parametrize("name", arguments())
def test_opcheck(executor, name):
    torch.library.opcheck(getattr(executor, name).default, arguments()[name], test_utils=CHECKS)


def test_residual_is_its_levels(executor, monkeypatch):
    """As the cuda backend composes it of quantize."""
    asked = []
    monkeypatch.setattr(_border, "call", lambda op, backend: (asked.append((op, backend)), executor.quantize)[1])
    x, codebooks = cases.normal(2, 2, 15, 6, seed=7), cases.normal(3, 2, 7, 6, seed=8)
    x[1, 0, 3, 2] = float("nan")
    mask = torch.rand(2, 15, generator=torch.Generator().manual_seed(9)) < 0.8
    for flags in ((True, True), (False, False)):
        found = _residual_cuda(x, codebooks, mask, 0, *flags)
        expected = reference.residual(x, codebooks, mask, 0, *flags)
        assert all(f.shape == e.shape and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))
        same(found[2], expected[2]), same(found[4], expected[4]), same(found[5], expected[5])
        for i in (0, 1, 3, 6):
            close(found[i].nan_to_num(-7.0), expected[i].nan_to_num(-7.0), 1e-4)
    assert asked == [("quantize", "cuda")] * 2 and _border.implemented("residual", "cuda")


def test_straight_through_gradient_of_the_registered_op(executor):
    x, codebook = cases.normal(1, 1, 30, 6, seed=3).requires_grad_(), cases.normal(1, 7, 6, seed=4).requires_grad_()
    quantized, sq_error, indices, *_ = executor.quantize(x, codebook, None, 0, False, None, None, None)
    gradient = cases.normal(1, 1, 30, 6, seed=5)
    (grad_x,) = torch.autograd.grad(quantized, x, gradient, retain_graph=True)
    assert torch.equal(grad_x, gradient)
    (grad_codebook,) = torch.autograd.grad(sq_error[1], codebook)
    code = codebook[0][indices[0, 0]].detach()
    expected = torch.zeros(7, 6, dtype=torch.float64).index_add_(
        0, indices[0, 0], 2 * (code - x[0, 0].detach()).double()
    )
    # Sums of at most 30 float32 products, each rounded a few times.
    torch.testing.assert_close(
        grad_codebook[0].double(), expected, rtol=0, atol=40 * 2.0**-24 * expected.abs().max().item()
    )


def test_unsupported_dtypes_and_shapes_are_refused_in_words(executor):
    x, codebook = cases.normal(1, 1, 3, 4), cases.normal(1, 5, 4)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        executor.nearest(x.double(), codebook, 0, None, None, None)
    with pytest.raises(RuntimeError, match="codebook must be"):
        executor.nearest(x, cases.normal(1, 5, 3), 0, None, None, None)
    with pytest.raises(RuntimeError, match="indices need x's shape"):
        executor.code_stats(x, torch.zeros(1, 1, 2, dtype=torch.int64), 5)
    for size in (0, 2**31 - 1):
        with pytest.raises(RuntimeError, match="codebook_size must lie"):
            executor.code_stats(x, torch.zeros(1, 1, 3, dtype=torch.int64), size)
    with pytest.raises(RuntimeError, match="metric must be"):
        executor.nearest(x, codebook, 3, None, None, None)
    size, sums, counts = torch.ones(1, 5), torch.ones(1, 5, 4), torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="cluster_sum and sums"):
        executor.ema_update_(codebook, size, sums, sums[:, :4], counts, None, 0.9, 1e-5)
    with pytest.raises(RuntimeError, match="frozen must be"):
        executor.ema_update_(codebook, size, sums, sums, counts, counts, 0.9, 1e-5)


def test_gpus_that_are_too_old_are_left_to_the_reference(monkeypatch):
    capability = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    reasons = _backends._reasons.__wrapped__  # without what it remembers of this machine
    for backend in ("cuda", "triton"):
        assert any("GPU number 1" in reason and "7.5" in reason for reason in reasons("nearest", backend, "cuda", ()))
    capability[1] = (8, 0)
    assert not any("capability" in reason for reason in reasons("nearest", "triton", "cuda", ()))
    assert not any("capability" in reason for reason in reasons("nearest", "cpu", "cpu", ()))

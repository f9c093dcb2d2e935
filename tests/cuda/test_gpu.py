"""What only a GPU can show. Everything here is skipped, loudly, where there is none; tests/ops runs the contract
there too.
"""

import ctypes
from pathlib import Path

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, same, same_bits

import vqfast

ops = torch.ops.vqfast


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device, so these kernels have only been executed on a CPU")
    reasons = vqfast._backends.reasons("nearest", "cuda", torch.empty(0, device="cuda"))
    if reasons:
        pytest.skip("cuda: " + "; ".join(reasons))


@pytest.fixture(params=["float32 screen", "Hopper screen", "few rows"])
def search(request, gpu):
    if request.param == "Hopper screen" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("nowhere: not a Hopper GPU")
    library = ctypes.CDLL(str(Path(vqfast.__file__).with_name("_C_cuda.so")))
    before_hopper = library.vqfast_cuda_hopper_allow(int(request.param == "Hopper screen"))
    before_few = library.vqfast_cuda_few_rows_allow(int(request.param == "few rows"))
    yield request.param
    library.vqfast_cuda_hopper_allow(before_hopper)
    library.vqfast_cuda_few_rows_allow(before_few)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", cases.NEAREST, ids=lambda f: f.__name__)
def test_adversarial_data(search, build, metric):
    x, codebook = build()
    expected = oracle.nearest(x, codebook, metric)
    distance, indices = ops.nearest_cuda(
        x.cuda()[None, None], codebook.cuda()[None], METRIC_CODE[metric], None, None, None
    )
    same(indices[0, 0], expected.indices), same(distance[0, 0], expected.distance)


@pytest.mark.parametrize("dim", [16, 64, 100, 128, 200, 256, 300])
def test_many_rows_and_codes(search, dim):
    """More than one wave of blocks, and thousands of tiles through every ring; the reference backend on the same
    device knows.
    """
    x, codebook = (t.cuda() for t in cases.clustered(4_000 if search == "few rows" else 40_000, 5_000, dim, seed=dim))
    distance, indices = ops.nearest_cuda(x[None, None], codebook[None], 0, None, None, None)
    expected = ops.nearest_reference(x[None, None], codebook[None], 0, None, None, None)
    same(indices, expected[1]), same(distance, expected[0])
    for _ in range(20):
        again = ops.nearest_cuda(x[None, None], codebook[None], 0, None, None, None)
        same_bits(again[0], distance), same_bits(again[1], indices)


def test_a_captured_step_replays_on_new_data(search):
    x, codebook = (t.cuda() for t in cases.clustered(3000, 600, 48, seed=1))
    x, codebook = x[None, None].clone(), codebook[None].clone()
    ops.quantize_cuda(x, codebook, None, 0, True, None, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_cuda(x, codebook, None, 0, True, None, None, None)
    x.copy_(cases.normal(3000, 48, seed=2)[None, None])
    codebook.copy_(cases.normal(600, 48, seed=3)[None])
    graph.replay()
    eager = ops.quantize_cuda(x, codebook, None, 0, True, None, None, None)
    for a, b in zip(captured, eager, strict=True):
        same_bits(a, b)


def test_runs_on_the_current_stream_without_waiting(search):
    x, codebook = (t.cuda()[None] for t in cases.clustered(500, 200, 16, seed=4))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # once for memory and kernels, which the first call waits for
            ops.nearest_cuda((x * 2)[None], codebook, 0, None, None, None)
        stream.synchronize()
        torch.cuda._sleep(50_000_000)
        moved = x * 2
        result = ops.nearest_cuda(moved[None], codebook, 0, None, None, None)
        assert not stream.query(), "the op waited for the device"
    stream.synchronize()
    same(result[1][0, 0], oracle.nearest(x[0] * 2, codebook[0]).indices)


def test_statistics_are_the_same_bits_every_time(gpu):
    x = cases.normal(1, 1, 200_000, 33, seed=5).cuda()
    indices = torch.randint(0, 700, (1, 1, 200_000), generator=cases.generator(6)).cuda()
    indices[..., ::2] = 3
    first = ops.code_stats_cuda(x, indices, 700)
    for _ in range(20):
        for a, b in zip(ops.code_stats_cuda(x, indices, 700), first, strict=True):
            same_bits(a, b)
    same(first[1].cpu(), oracle.code_stats(x, indices, 700)[1])


def test_masked_conv_is_the_same_bits_every_time_and_in_a_graph(gpu):
    """And on the CPU: both add in the order of taps and channels."""
    x, weight, bias = (cases.normal(*size, seed=7).cuda() for size in ((3, 140, 17, 33), (200, 140, 3, 3), (200,)))
    grad = cases.normal(3, 200, 17, 33, seed=8).cuda()

    def step():
        y = ops.masked_conv_cuda(x, weight, bias, True, 1, 2)
        return y, *ops.masked_conv_backward_cuda(grad, x, weight, True, 1, 2, True, True), ops.gate_cuda(y, None, 0)

    first = step()
    if not vqfast._backends.reasons("masked_conv", "cpu", x.cpu()):
        same(first[0].cpu(), ops.masked_conv_cpu(x.cpu(), weight.cpu(), bias.cpu(), True, 1, 2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(5):
        graph.replay()
        for a, b in zip(captured, first, strict=True):
            same_bits(a, b)

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


@pytest.fixture(params=["float32 screen", "Hopper screen"])
def screen(request, gpu):
    if request.param == "Hopper screen" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuda: not a Hopper GPU")
    library = ctypes.CDLL(str(Path(vqfast.__file__).with_name("_C_cuda.so")))
    before = library.vqfast_cuda_hopper_allow(int(request.param == "Hopper screen"))
    yield request.param
    library.vqfast_cuda_hopper_allow(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("build", cases.NEAREST, ids=lambda f: f.__name__)
def test_adversarial_data(screen, build, metric):
    x, codebook = build()
    expected = oracle.nearest(x, codebook, metric)
    distance, indices = ops.nearest_cuda(
        x.cuda()[None, None], codebook.cuda()[None], METRIC_CODE[metric], None, None, None
    )
    same(indices[0, 0], expected.indices), same(distance[0, 0], expected.distance)


@pytest.mark.parametrize("dim", [16, 64, 100, 128, 200, 256, 300])
def test_many_rows_and_codes(screen, dim):
    """More than one wave of blocks, and thousands of tiles through every ring; the reference backend on the same
    device knows.
    """
    x, codebook = (t.cuda() for t in cases.clustered(40_000, 5_000, dim, seed=dim))
    distance, indices = ops.nearest_cuda(x[None, None], codebook[None], 0, None, None, None)
    expected = ops.nearest_reference(x[None, None], codebook[None], 0, None, None, None)
    same(indices, expected[1]), same(distance, expected[0])
    for _ in range(20):
        again = ops.nearest_cuda(x[None, None], codebook[None], 0, None, None, None)
        same_bits(again[0], distance), same_bits(again[1], indices)


def test_a_captured_step_replays_on_new_data(screen):
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


def test_runs_on_the_current_stream_without_waiting(screen):
    x, codebook = (t.cuda()[None] for t in cases.clustered(500, 200, 16, seed=4))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
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

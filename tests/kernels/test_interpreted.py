"""The Triton kernels in Triton's interpreter: values, certificates and determinism. The op suite runs them too, as backend "triton".

The interpreter executes one program after another with numpy: it finds wrong indices, masks, ties and offsets, but no races, and it gets
bfloat16 arithmetic wrong, so no kernel does any (rows are widened right after the load).
"""

import ast
from pathlib import Path

import cases
import oracle
import pytest
import torch
from check import METRIC_CODE, METRICS, close, run_python, same, same_bits

from vqfast import _backends, reference

KERNELS = Path(__file__).parents[2] / "kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_exists():
    reason = "; ".join(_backends.reasons("nearest", "triton", torch.empty(0, device=DEVICE)))
    if reason:
        pytest.skip(f"triton: {reason}")


def kernels(family):
    import importlib

    return importlib.import_module(f"vqfast.kernels.{family}")


def put(*tensors):
    return [t.to(DEVICE) for t in tensors]


def nearest(x, codebook, metric="l2"):
    """Rows [N, D] and codes [K, D] on their canonical shapes."""
    x, codebook = put(x, codebook)
    distance, indices = kernels("nearest").nearest_triton(x[None, None], codebook[None], METRIC_CODE[metric])
    return distance[0, 0], indices[0, 0]


def open_rows(x, codebook, metric="l2"):
    """How many rows the tensor-core screen could not certify, and the kernel's answer."""
    module = kernels("nearest")
    x, codebook = put(x[None, None], codebook[None])
    b, g, n, d = x.shape
    config = module._tuning.screen(d, 227 * 1024)
    codes = module._prepare_codes(codebook, METRIC_CODE[metric], config.row, config.half)
    distance = torch.empty(b, g, n, device=x.device)
    indices = torch.empty(b, g, n, dtype=torch.int64, device=x.device)
    count = module._search((0, n), x, codebook, codes, METRIC_CODE[metric], config, distance, indices)
    return int(count.sum()), distance[0, 0], indices[0, 0]


# ---- the certificate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim, k", [(16, 300), (33, 1000), (64, 700)])
def test_the_screen_certifies_most_rows(metric, dim, k):
    """On data like a trained encoder's, at most one row in ten is left to the second kernel, and every code is right."""
    x, codebook = cases.clustered(500, k, dim, seed=dim)
    left, distance, indices = open_rows(x, codebook, metric)
    expected = oracle.nearest(x, codebook, metric)
    same(indices, expected.indices), same(distance, expected.distance)
    assert left <= len(x) // 10


def test_an_offset_costs_no_certificate():
    """Centring takes an offset of 1,000 out before anything is rounded to float16."""
    x, codebook = cases.clustered(300, 256, 32, seed=1)
    near, far = open_rows(x, codebook)[0], open_rows(x + 1000.0, codebook + 1000.0)[0]
    assert far <= near + 15


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_one_huge_code_costs_no_certificate(metric):
    """A code at 1e30 must loosen its own bound only."""
    x, codebook = cases.clustered(300, 256, 32, seed=2)
    before = open_rows(x, codebook, metric)[0]
    codebook[9] = 1e30
    left, distance, indices = open_rows(x, codebook, metric)
    expected = oracle.nearest(x, codebook, metric)
    same(indices, expected.indices), same(distance, expected.distance)
    assert left <= before + 15


def test_equal_codes_cost_no_certificate():
    """Codes that repeat a lower one drop out before the search; with them every row would stay open."""
    x, codebook = cases.clustered(200, 64, 32, seed=3)
    left, _, indices = open_rows(x, codebook.repeat(6, 1))
    same(indices, oracle.nearest(x, codebook).indices)
    assert left <= 20


def test_the_certificate_is_needed():
    """Two tight clusters of codes, far apart: float16 alone confuses the codes of a cluster, so this data can tell."""
    g = cases.generator(4)
    codebook = torch.tensor([1.0, -1.0]).repeat(128)[:, None] * torch.randn(1, 32, generator=g)
    codebook = codebook + 1e-4 * torch.randn(256, 32, generator=g)
    x = codebook[torch.randint(0, 256, (300,), generator=g)] + 1e-4 * torch.randn(300, 32, generator=g)
    half = (x - codebook.mean(0)).half().float(), (codebook - codebook.mean(0)).half().float()
    guess = (half[1].square().sum(-1) / 2 - half[0] @ half[1].T).argmin(-1)
    expected = oracle.nearest(x, codebook)
    assert (guess != expected.indices).any()
    distance, indices = nearest(x, codebook)
    same(indices, expected.indices), same(distance, expected.distance)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splitting_the_codes_changes_no_bit(monkeypatch, metric, splits):
    """Few rows share the codes among several programs; how many depends on the device."""
    module = kernels("nearest")
    x, codebook = cases.clustered(30, 700, 20, seed=5)
    codebook[600:650] = codebook[:50]
    monkeypatch.setattr(module, "processors", lambda tensor: (splits + 1) // 2)
    distance, indices = nearest(x, codebook, metric)
    expected = oracle.nearest(x, codebook, metric)
    same(indices, expected.indices), same(distance, expected.distance)


def test_rows_come_in_slabs(monkeypatch):
    """More rows than one launch takes, and a slab border inside a batch element."""
    module = kernels("nearest")
    monkeypatch.setattr(module, "ROWS_PER_LAUNCH", 70)
    x, codebook = cases.normal(3, 2, 50, 17, seed=6), cases.normal(2, 40, 17, seed=7)
    distance, indices = module.nearest_triton(*put(x, codebook), 0)
    expected = oracle.nearest(x, codebook)
    same(indices, expected.indices), same(distance, expected.distance)


@pytest.mark.parametrize("dim", [40, 80, 300])
def test_rows_in_several_chunks(monkeypatch, dim):
    """The screen that holds no whole row on chip, as on a device with little shared memory."""
    module = kernels("nearest")
    monkeypatch.setattr(module, "shared_memory", lambda tensor: 10_000)
    x, codebook = cases.clustered(60, 200, dim, seed=dim)
    distance, indices = nearest(x, codebook)
    expected = oracle.nearest(x, codebook)
    same(indices, expected.indices), same(distance, expected.distance)


# ---- statistics and the step -----------------------------------------------------------------------------------------


def problem(b, g, n, d, k, seed):
    """Half of the rows own code 1; some rows are masked, some not finite."""
    x = cases.normal(b, g, n, d, seed=seed)
    indices = torch.randint(-1, k, (b, g, n), generator=cases.generator(seed + 1))
    indices[..., ::2] = 1
    x[0, 0, 3, d - 1], x[-1, -1, 5, 0] = torch.nan, torch.inf
    return x, indices


@pytest.mark.parametrize("b, g, n, d, k", [(2, 2, 700, 5, 3), (1, 1, 1500, 7, 9), (1, 1, 40, 300, 20), (2, 3, 13, 33, 50)])
def test_code_stats_with_a_hot_code(b, g, n, d, k):
    x, indices = problem(b, g, n, d, k, seed=n)
    sums, counts = kernels("ema").code_stats_triton(*put(x, indices), k)
    expected_sums, expected_counts = oracle.code_stats(x, indices, k)
    same(counts, expected_counts)
    # Each sum is taken in float64, so that one float32 rounding is all that is lost.
    close(sums, expected_sums, expected_sums.abs() * 2.0**-24 + 1e-12 * expected_sums.abs().max())
    again = kernels("ema").code_stats_triton(*put(x, indices), k)
    same_bits(again[0], sums)


def test_key_types_reach_past_16_bits():
    """A codebook of 40,000 codes sorts 32-bit keys."""
    x, indices = cases.normal(1, 1, 30, 2, seed=8), torch.randint(0, 40_000, (1, 1, 30), generator=cases.generator(9))
    sums, counts = kernels("ema").code_stats_triton(*put(x, indices), 40_000)
    same(counts, oracle.code_stats(x, indices, 40_000)[1])
    same(sums[0, indices[0, 0, 0].to(sums.device)], x[0, 0, 0])


@pytest.mark.parametrize("frozen", [False, True])
def test_ema_update_is_the_reference_to_the_bit(frozen):
    state = [cases.normal(2, 9, 70, seed=10), cases.normal(2, 9, seed=11).abs(), cases.normal(2, 9, 70, seed=12)]
    state[1][0, 3] = 0.0
    state[2][1, 4, 69] = 3e38
    sums, counts = cases.normal(2, 9, 70, seed=13), torch.randint(0, 5, (2, 9), generator=cases.generator(14))
    counts[0, 3] = 0
    sums[1, 4, 69] = 3e38
    mask = torch.arange(18).view(2, 9) % 4 == 0 if frozen else None
    ours = put(*(t.clone() for t in state))
    kernels("ema").ema_update_triton_(*ours, *put(sums, counts), None if mask is None else mask.to(DEVICE), 0.99, 1e-5)
    reference.ema_update_(*state, sums, counts, mask, 0.99, 1e-5)
    for got, expected in zip(ours, state):
        same(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantize_writes_what_the_reference_writes(dtype):
    x, codebook = problem(2, 2, 50, 33, 40, seed=15)[0].to(dtype), cases.normal(2, 40, 33, seed=16)
    mask = torch.rand(2, 50, generator=cases.generator(17)) > 0.3
    got = kernels("quantize").quantize_triton(*put(x, codebook, mask), 0, True)
    expected = reference.quantize(x, codebook, mask, 0, True)
    for name, a, b in zip(("quantized", "sq_error", "indices", "sums", "counts", "nonfinite"), got, expected):
        if name == "sq_error":  # float64 sums in two orders
            close(a, b, b.abs() * 2.0**-52 * x.numel(), name)
        else:
            same(a, b, name)


def test_residual_writes_what_the_reference_writes():
    x, codebooks = problem(2, 2, 40, 20, 30, seed=18)[0], cases.normal(3, 2, 30, 20, seed=19)
    mask = torch.rand(2, 40, generator=cases.generator(20)) > 0.3
    got = kernels("residual").residual_triton(*put(x, codebooks, mask), 0, True, True)
    expected = reference.residual(x, codebooks, mask, 0, True, True)
    for name, a, b in zip(("quantized", "sq_error", "indices", "sums", "counts", "nonfinite", "pull"), got, expected):
        if name == "sq_error":
            close(a, b, b.abs() * 2.0**-52 * x.numel(), name)
        else:
            same(a, b, name)


def test_gather_reads_nothing_outside_the_codebook():
    codebook, indices = put(cases.normal(1, 7, 5, seed=21), torch.tensor([[[-1, 0, 6, 7, 2**40, -(2**40), 3]]]))
    out = kernels("gather").gather_triton(codebook, indices)[0, 0]
    same(out[[1, 2, 6]], codebook[0, [0, 6, 3]])
    assert (out[[0, 3, 4, 5]] == 0).all()


# ---- offsets and source ----------------------------------------------------------------------------------------------


def test_more_groups_than_a_grid_holds(monkeypatch):
    x, codebook = put(cases.normal(2, 5, 9, 4, seed=31), cases.normal(5, 7, 4, seed=32))
    sums, counts = put(cases.normal(5, 7, 4, seed=33), torch.arange(35).view(5, 7) % 3)
    frozen = put(torch.arange(35).view(5, 7) % 4 == 0)[0]

    def results():
        state = codebook.clone(), torch.ones(5, 7, device=DEVICE), codebook.clone()
        kernels("ema").ema_update_triton_(*state, sums, counts, frozen, 0.9, 1e-5)
        return *kernels("nearest").nearest_triton(x, codebook, METRIC_CODE["l2"]), *state

    at_once = results()
    launched = []
    for name, axis in (("ema", 0), ("nearest", 1)):
        module = kernels(name)
        monkeypatch.setattr(module, "on_device", lambda t, axis=axis, real=module.on_device: (launched.append(t.shape[axis]), real(t))[1])
    monkeypatch.setattr(kernels("_triton"), "MOST_GROUPS", 2)
    for part, whole in zip(results(), at_once, strict=True):
        same_bits(part, whole)
    assert launched == [2, 2, 1, 2, 2, 1]


BEYOND_32_BITS = """
import torch
from vqfast.kernels import nearest, gather, ema, quantize
import cases, oracle
# 20 rows, 2^27 elements apart: 10 GiB of addresses, 20 pages of memory.
x = torch.empty(20 * 2**27).as_strided((1, 1, 20, 20), (1, 1, 2**27, 1))
x.copy_(cases.normal(20, 20, seed=1))
codes = torch.empty(20 * 2**27).as_strided((1, 20, 20), (1, 2**27, 1))
codes.copy_(cases.normal(20, 20, seed=2))
across = torch.empty(20 * 2**27).as_strided((1, 1, 20, 20), (1, 1, 1, 2**27))  # the stride of components
across.copy_(x)
expected = oracle.nearest(x[0, 0], codes[0])
for rows in (x, across):
    distance, indices = nearest.nearest_triton(rows, codes, 0)
    assert torch.equal(indices[0, 0], expected.indices) and torch.equal(distance[0, 0], expected.distance)
    short = nearest.nearest_triton(rows[..., :5], codes[..., :5], 0)[1]
    assert torch.equal(short[0, 0], oracle.nearest(x[0, 0, :, :5].clone(), codes[0, :, :5].clone()).indices)
    sums, _ = ema.code_stats_triton(rows, indices, 20)
    assert torch.equal(sums, ema.code_stats_triton(x.clone(), indices, 20)[0])
    assert torch.equal(quantize.quantize_triton(rows, codes, None, 0, False)[0], gather.gather_triton(codes, indices))
assert torch.equal(gather.gather_triton(codes, indices)[0, 0], codes[0, indices[0, 0]])
"""


@pytest.mark.unpoisoned
def test_strides_beyond_32_bits():
    """In a process of its own: a wrapped offset may end it."""
    if DEVICE == "cuda":
        pytest.skip("nowhere: bench/gpu_check.py tests sizes beyond 2^31 on a GPU")
    run_python(BEYOND_32_BITS, timeout=300, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.stem)
def test_every_program_id_is_64_bit(path):
    """tl.program_id(..) and tl.num_programs(..) are 32-bit: each must be widened where it is read, or be an axis' group count."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "program_id":
            line = source.splitlines()[node.lineno - 1]
            assert "program_id" in line and ".to(tl.int64)" in line, f"{path.name}:{node.lineno}: {line.strip()}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_torch_triton_and_each_other(path):
    allowed = {"torch", "triton", "typing", "contextlib", "functools", "os", "__future__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= allowed
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in allowed

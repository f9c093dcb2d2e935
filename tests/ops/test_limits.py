"""Memory that never holds N x K, offsets beyond 2^31, counts beyond 2^24, hostile hints (contract 1, 2, 5, 7, 9).

Most cases run in their own interpreter, where memory can be measured and a wrong pointer takes nothing with it.
"""

import pytest
import torch
from check import close, device_of, no_interpreter, put, run_python

import vqfast

pytestmark = pytest.mark.slow

# What every script starts with: peak() runs a call and returns the MiB that the process's high-water mark rose above
# what was resident before. Writing 5 to clear_refs resets the mark (Linux); where it may not be written the mark can
# only read too high.
HEAD = """
import os, sys
os.environ.setdefault("TRITON_INTERPRET", "1")
import torch, vqfast, oracle
backend = sys.argv[1]

def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(key))

def peak(call):
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass
    before = status("VmRSS")
    result = call()
    return result, status("VmHWM") - before

def g(seed):
    return torch.Generator().manual_seed(seed)
"""


def run(backend, body):
    if device_of(backend).type == "cuda":
        pytest.skip("these scripts measure the process's own memory; the GPU's is measured by test_gpu_memory")
    return run_python(HEAD + body, backend, timeout=280)


# n, k, d, MiB allowed. One byte per pair is n * k: 1024 MiB for the native backend, 256 MiB for the reference, whose
# tiles are large because torch is slow on small ones. 64 MiB is what the project promises for search at the first size.
MEMORY = {"cpu": (16384, 65536, 4, 64), "reference": (8192, 32768, 1, 160)}

SEARCH = """
n, k, d, limit = {sizes}
x, codebook = torch.randn(n, d, generator=g(0)), torch.randn(k, d, generator=g(1))
call = {call}
call(x[:64], codebook[:100])  # whatever is set up once
found, extra = peak(lambda: call(x, codebook))
print(f"peak extra memory {{extra:.1f}} MiB")
assert extra < limit, f"{{extra:.1f}} MiB above what was resident; one byte per pair would be {{n * k / 2**20:.0f}} MiB"
some = torch.arange(0, n, n // 7)
wanted = oracle.nearest(x[some], codebook)
assert torch.equal(found.indices[some], wanted.indices)
"""


@pytest.mark.parametrize("call", ["nearest", "vector_quantize"])
def test_search_never_holds_n_by_k(backend, call):
    if backend not in MEMORY:
        pytest.skip("interpreter: a search of this size takes hours under Triton's interpreter")
    if backend == "reference" and call != "nearest":
        pytest.skip("the reference's other ops call its nearest; one slow search is enough")
    run(backend, SEARCH.format(sizes=MEMORY[backend], call=f"lambda x, c: vqfast.{call}(x, c, backend=backend)"))


RESIDUAL = """
x, codebooks = torch.randn(64, 256, generator=g(0)), torch.randn(16, 4096, 256, generator=g(1)).bfloat16()
call = lambda levels: vqfast.residual_quantize(x, codebooks[:levels], backend=backend).indices
call(1)
found, extra = peak(lambda: call(16))
one = 4096 * 256 * 4 / 2**20
assert extra < 4 * one, f"{extra:.1f} MiB above what was resident; a level's codes take {one:.0f} MiB in float32"
"""


def test_residual_widens_one_level_at_a_time(backend):
    no_interpreter(backend)
    if backend == "reference":
        pytest.skip("reference: plain torch, which widens more than it needs")
    run(backend, RESIDUAL)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_rows_cost_at_most_one_float32_copy(backend, dtype):
    """The contract allows O(N D): 256 MiB in float32 here. In float64 it would be 512 MiB."""
    if backend != "cpu":
        pytest.skip("this is about native code; the reference computes in float64 throughout")
    run(backend, f"""
x = torch.randn(2**20, 64, generator=g(0)).to(torch.{dtype})
codebook = torch.randn(8, 64, generator=g(1))
vqfast.nearest(x[:64], codebook, backend=backend)
found, extra = peak(lambda: vqfast.nearest(x, codebook, backend=backend))
own = 12 * len(x) / 2**20  # int64 indices and float32 distances
print(extra, own)
assert extra < own + 4 * x.numel() / 2**20 + 64, f"{{extra:.1f}} MiB"
""")


FAR = """
# [rows, d] views whose rows lie 2^27 (or more) elements apart: the last offset exceeds 2^31, a handful of pages is touched.
def far(values, stride):
    view = torch.empty((len(values) - 1) * stride + values.shape[1] * 3, dtype=values.dtype).as_strided(values.shape, (stride, 3))
    view.copy_(values)
    return view

x, codebook = torch.randn(40, 5, generator=g(0)), torch.randn(40, 5, generator=g(1))
"""


@pytest.mark.parametrize("case", {
    "x": "a, b = far(x, 2**26 + 1), codebook",
    "codebook": "a, b = x, far(codebook, 2**26 + 1)",
    "both": "a, b = far(x, 2**26 + 1), far(codebook, 2**26 + 3)",
    "bfloat16": "x = x.bfloat16(); a, b = far(x, 2**27 + 1), codebook",
    "columns": "a, b = far(x.T.contiguous(), 2**29 + 1).T, codebook",
}.items(), ids=lambda c: c[0])  # fmt: skip
def test_offsets_beyond_2_31(backend, case):
    run(backend, FAR + case[1] + """
assert max(t.stride(i) * (t.shape[i] - 1) for t in (a, b) for i in (0, 1)) > 2**31
found = vqfast.nearest(a, b, backend=backend)
wanted = oracle.nearest(x, codebook)
assert torch.equal(found.indices, wanted.indices) and torch.equal(found.distance, wanted.distance)
""")


@pytest.mark.family("gather")
def test_gather_from_codes_far_apart(backend):
    run(backend, FAR + """
indices = torch.tensor([39, -1, 0, 17, 39])
found = vqfast.gather(far(codebook, 2**26 + 1), indices, backend=backend)
assert torch.equal(found, oracle.gather(codebook, indices))
""")


@pytest.mark.family("quantize")
def test_quantize_rows_far_apart(backend):
    run(backend, FAR + """
rows = far(x, 2**26 + 1)[None, None]
mask = torch.arange(40)[None] % 3 > 0
found = getattr(torch.ops.vqfast, "quantize_" + backend)(rows, far(codebook, 2**26 + 1)[None], mask, 0, True, None, None, None)
wanted = oracle.step(x[None, None], codebook[None], mask)
assert torch.equal(found[2], wanted.indices) and torch.equal(found[0], wanted.quantized.float())
assert torch.equal(found[4], wanted.counts) and torch.allclose(found[3].double(), wanted.sums, rtol=0, atol=1e-4)
""")


@pytest.mark.family("ema")
def test_statistics_of_rows_far_apart(backend):
    run(backend, FAR + """
indices = torch.arange(40) % 7
found = vqfast.code_stats(far(x.round(), 2**26 + 1), indices, 7, backend=backend)
wanted = oracle.code_stats(x.round()[None, None], indices[None, None], 7)
assert torch.equal(found.counts, wanted[1][0]) and torch.equal(found.sums, wanted[0][0].float())
""")


def test_more_than_2_31_pairs(backend):
    """N x K = 2.7e9 at D = 1: a pair counter of 32 bits would wrap, in the loop or in the choice of road."""
    if backend != "cpu":
        pytest.skip("only the native backend does this many pairs in reasonable time on a CPU")
    run(backend, """
x, codebook = torch.randn(20992, 1, generator=g(0)), torch.randn(131072, 1, generator=g(1))
found = vqfast.nearest(x, codebook, backend=backend)
some = torch.cat([torch.arange(10), torch.arange(16300, 16400, 10), torch.arange(20982, 20992)])
wanted = oracle.nearest(x[some], codebook)
assert torch.equal(found.indices[some], wanted.indices) and torch.equal(found.distance[some], wanted.distance)
""")


@pytest.mark.family("gather")
def test_more_than_2_31_output_elements(backend):
    """2.2e9 float16 elements, 4 GiB: the one case here that needs real memory."""
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) / 2**20 for line in f if line.startswith("MemAvailable"))
    if backend != "cpu" or free < 9:
        pytest.skip(f"memory: needs the native backend and 9 GiB free, {free:.1f} are")
    run(backend, """
n, d = 2**21 + 5, 1024
codebook = torch.randn(3, d, generator=g(0)).half()
indices = torch.full((n,), -1)
indices[::2**18], indices[-1] = 1, 2
found = vqfast.gather(codebook, indices, backend=backend)
for at in [*range(0, n, 2**18), n - 1]:
    assert torch.equal(found[at], codebook[indices[at]]), at
assert found[1].eq(0).all() and found[-2].eq(0).all()
""")


def test_gpu_memory(backend):
    """The same promise on the device: extra memory stays far below one byte per pair."""
    if device_of(backend).type != "cuda":
        pytest.skip("streams, graphs and device memory belong to GPU backends")
    x, codebook = torch.randn(16384, 64, device="cuda"), torch.randn(65536, 64, device="cuda")
    vqfast.nearest(x[:64], codebook[:100], backend=backend)
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vqfast.nearest(x, codebook, backend=backend)
    torch.cuda.synchronize()
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 < 64


@pytest.mark.family("ema")
def test_counts_above_2_24_are_exact(backend):
    """2^24 + 2 rows through strides of zero: a float32 counter would stop at 2^24."""
    no_interpreter(backend)
    n = 2**24 + 2
    x, indices = put(backend, torch.ones(1), torch.ones(1, dtype=torch.int64))
    got = vqfast.code_stats(x.expand(n, 1), indices.expand(n), 3, backend=backend)
    assert got.counts.tolist() == [0, n, 0]
    # All partial sums are integers; in float32 blocks they may round above 2^24, by less than 2 each time.
    close(got.sums[1], torch.tensor([float(n)]), n * 2.0**-23)


MISSHAPEN = """
import os, sys
os.environ.setdefault("TRITON_INTERPRET", "1")
import torch, vqfast, oracle
backend = sys.argv[1]
x, codebook = torch.randn(2, 2, 30, 6), torch.randn(2, 40, 6)
wanted = oracle.nearest(x, codebook).indices
right = {"order": torch.arange(40).repeat(2, 1), "basis": torch.eye(6)[:3].repeat(2, 1, 1), "guess": wanted}
wrong = {
    "order": [torch.arange(40), torch.arange(41).repeat(2, 1), torch.arange(3).repeat(2, 1), torch.zeros(0, dtype=torch.int64),
              torch.arange(40).repeat(1, 1), right["order"].float(), right["order"].int(), torch.tensor(0)],
    "basis": [torch.eye(6), torch.eye(7)[:3].repeat(2, 1, 1), torch.eye(5)[:3].repeat(2, 1, 1), torch.zeros(0),
              torch.eye(6)[:3].repeat(1, 1, 1), right["basis"].double(), right["basis"].half(), torch.tensor(0.0)],
    "guess": [wanted[0], wanted[..., :5], wanted.repeat(1, 1, 2), torch.zeros(0, dtype=torch.int64), wanted[:, :1],
              wanted.float(), wanted.int(), torch.tensor(0)],
}
for name, values in wrong.items():
    for at, value in enumerate(values):
        hints = {**right, name: value}
        print(name, at, tuple(value.shape), value.dtype, flush=True)
        try:
            found = getattr(torch.ops.vqfast, "nearest_" + backend)(x, codebook, 0, hints["order"], hints["basis"], hints["guess"])
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        assert torch.equal(found[1], wanted), "a hint cost a code"
"""


def test_misshapen_hints_are_refused_or_ignored(backend):
    """Straight at the border, where no Python check stands: an error or the right codes, never a crash."""
    if put(backend, torch.empty(0)).is_cuda:
        pytest.skip("an illegal access would take the device's context with it; the CPU runs share the check")
    run_python(MISSHAPEN, backend)

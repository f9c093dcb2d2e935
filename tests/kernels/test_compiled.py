"""The Triton kernels compiled for GPUs that are not here: no spills, no growth, no fused float64, no recompilation per batch size.

Each test is a process without TRITON_INTERPRET, because Triton reads it at import.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from check import run_python

HERE = Path(__file__).parent
PREPARE = "import os, sys; sys.path.insert(0, sys.argv[1]); import aot; from triton.backends.compiler import GPUTarget\n"


@pytest.fixture(autouse=True)
def triton_exists():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton: Triton is not installed (pip install triton)")


def compiled(source: str, **env) -> str:
    return run_python(PREPARE + source, str(HERE), timeout=500, TRITON_INTERPRET="0", OMP_NUM_THREADS="1", **env)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_registers_spills_and_shared_memory_stay_within_the_lock(arch):
    """A version of Triton that the lock file does not know is compiled and held to the absolute limits only."""
    command = [sys.executable, "-W", "ignore", str(HERE / "aot.py"), "--arch", str(arch)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    if "no lock for Triton" in done.stdout:
        pytest.skip(f"{done.stdout.strip()} (its kernels compiled for sm_{arch})")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_lock_holds_no_spill_on_sm_90():
    import json

    lock = json.loads((HERE.parents[1] / "kernels" / "kernels.lock.json").read_text())
    assert {"3.6", "3.7", "3.9"} <= set(lock)
    for version, archs in lock.items():
        assert set(archs) == {"sm_80", "sm_90", "sm_100"}, version
        spilling = [label for label, row in archs["sm_90"].items() if row["spills"]]
        assert not spilling, (version, spilling)
        for arch, limit in (("sm_80", 163), ("sm_90", 227), ("sm_100", 227)):
            assert max(row["shared"] for row in archs[arch].values()) <= limit * 1024


def test_growth_is_seen():
    """The gate itself: more registers, a new kernel and a lost one are three differences."""
    print(compiled("""
old = {"sm_90": {"a": {"registers": 10, "spills": 0, "shared": 5}, "gone": {"registers": 1, "spills": 0, "shared": 0}}}
new = {"sm_90": {"a": {"registers": 11, "spills": 0, "shared": 5}, "new": {"registers": 1, "spills": 0, "shared": 0}}}
assert len(aot.differences(new, old)) == 3 and aot.differences(old, old) == []
"""))


@pytest.mark.slow
def test_float64_is_not_fused_where_the_formula_decides():
    """A fused multiply-add rounds once where the contract rounds twice; square root and division must be the exact ones."""
    compiled("""
import re
launches = aot.launches_of_everything(227 * 1024, 132)
for label in ("nearest/D64/settle", "nearest/D64/resolve", "nearest/D8/resolve", "nearest/cosine/D64/settle",
              "nearest/cosine/D64/resolve", "nearest/dot/D64/settle", "nearest/dot/D64/resolve"):
    ptx = aot.compile_one(launches[label], GPUTarget("cuda", 90, 32))[1].asm["ptx"]
    found = set(re.findall(r"\\b(?:fma|mad|mul|add|sub|sqrt|div)\\.[a-z.]*f64", ptx))
    assert {"mul.rn.f64", "add.rn.f64"} <= found, (label, found)
    assert found <= {"mul.rn.f64", "add.rn.f64", "sub.rn.f64", "div.rn.f64", "sqrt.rn.f64"}, (label, found)
""")


@pytest.mark.slow
def test_tensor_cores_run_half_precision_products():
    """Half-precision products are wgmma on sm_90 and mma on sm_80; those that fell back to scalar code would still be right, and slow."""
    compiled("""
for arch, word in ((90, "wgmma.mma_async"), (80, "mma.sync")):
    launches = aot.launches_of_everything(*aot.CUDA[arch])
    for label in ("nearest/D128/screen", "masked_conv/bf16/conv", "masked_conv/fp16/weight_grad"):
        ptx = aot.compile_one(launches[label], GPUTarget("cuda", arch, 32))[1].asm["ptx"]
        assert word in ptx, (arch, label, word)
""")


@pytest.mark.slow
def test_rows_are_read_in_vectors():
    """Strides that the compiler does not look at must not cost the 16-byte loads of aligned rows; one word at a time would be right, and slow."""
    compiled("""
import re
launches = aot.launches_of_everything(*aot.CUDA[90])
for label in ("nearest/D64/rows", "code_stats/D128/block_sums", "quantize/D64/step", "nearest/principal/D128/reduce_rows"):
    ptx = aot.compile_one(launches[label], GPUTarget("cuda", 90, 32))[1].asm["ptx"]
    assert re.search(r"ld\\.global\\S*\\.v4\\.b32", ptx), label
""")


@pytest.mark.slow
def test_float32_convolutions_are_float32():
    """No TF32, whatever torch's switches say: 10 bits of a product would miss the contract's bound."""
    compiled("""
launches = aot.launches_of_everything(*aot.CUDA[90])
for label in ("masked_conv/fp32/conv", "masked_conv/fp32/weight_grad"):
    ptx = aot.compile_one(launches[label], GPUTarget("cuda", 90, 32))[1].asm["ptx"]
    assert "fma.rn.f32" in ptx and "tf32" not in ptx and "mma" not in ptx, label
""")


def test_a_new_batch_size_compiles_nothing_new():
    """Kernels take the number of rows, batches and pixels at run time: the compiler's input is the same for every one, 1 and multiples of 16 included,
    whatever the dimension; pictures of one pixel are rows."""
    compiled("""
import torch
from vqfast.kernels import ema, gather, masked_conv, quantize, residual
def inputs(seen):
    found = set()
    for launch in seen:
        source, options = aot.source_of(*launch)
        found.add((launch[0].__name__, str(source.signature), str(source.constants), str(source.attrs)))
    return found
def keys(x, groups=1):
    codes = torch.zeros(groups, 256, x.shape[-1])
    index = torch.zeros(x.shape[:3], dtype=torch.int64)
    with aot.recorded(227 * 1024, 132) as seen:
        gather.gather_triton(codes, index), ema.code_stats_triton(x, index, 256)
        quantize.quantize_triton(x, codes, None, 0, True)
        residual.residual_triton(x, codes[None].repeat(3, 1, 1, 1), None, 0, True, False)
        return inputs(seen)
def same(make, *sizes):
    expected = keys(make(*sizes[0]))
    for size in sizes[1:]:
        found = keys(make(*size))
        assert found == expected, (size, found ^ expected)
for dim in (1, 33, 64):  # strides that are multiples of 16 for some sizes only, and always
    same(lambda b, n: torch.zeros(b, 1, n, dim), (1, 512), (1, 1), (1, 2), (1, 15), (1, 16), (1, 17), (3, 1000), (1, 4096))
same(lambda b, h, w: torch.zeros(b, 64, h, w).flatten(2).mT[:, None], (2, 8, 8), (1, 7, 7), (3, 5, 9), (1, 16, 1), (2, 32, 32))
grouped = lambda n: keys(torch.zeros(2, n, 4, 32).transpose(1, 2), 4)
assert grouped(100) == grouped(1) == grouped(64)

def map_keys(batch, height, width):
    x, weight = torch.zeros(batch, 48, height, width), torch.zeros(80, 48, 5, 5)
    with aot.recorded(227 * 1024, 132) as seen:
        y = masked_conv.masked_conv_triton(x, weight, weight[:, 0, 0, 0].clone(), True, 1, 1)
        masked_conv.masked_conv_backward_triton(y, x, weight, True, 1, 1, True, True)
        masked_conv.gate_backward_triton(masked_conv.gate_triton(y, None, 0), y, None, 0)
        return inputs(seen)
expected = map_keys(2, 8, 8)
for size in ((1, 1, 1), (3, 5, 7), (16, 1, 16), (1, 16, 1), (2, 32, 32), (5, 17, 64)):
    assert map_keys(*size) == expected, (size, map_keys(*size) ^ expected)
""")


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["nearest/D64", "nearest/principal/D128", "gather/fp32", "code_stats/D128", "ema_update", "masked_conv/", "gate/",
                                    "quantize/D64", "residual"])  # fmt: skip
def test_amd_targets_compile(launch):
    """gfx942 (MI300): the compiler takes every kernel. Nothing more is known about AMD."""
    compiled(f"""
try:
    rows = aot.measure(["gfx942"], ["{launch}"])["gfx942"]
except Exception as error:
    raise SystemExit(f"gfx942: {{error!r}}"[:2000])
assert rows
""")

"""nvcc's view of the CUDA kernels: they compile without a warning, spill nothing, and need no more than the lock
file says.
"""

import collections
import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
spec = importlib.util.spec_from_file_location("kernel_report", CSRC / "testing" / "kernel_report.py")
kernel_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_report)

LOCK_HELP = "if that is meant: python csrc/testing/kernel_report.py --lock"


@pytest.fixture(scope="module")
def nvcc():
    if not kernel_report.nvcc():
        pytest.skip("cuda: no nvcc, so the CUDA kernels are not compiled for a GPU here")
    return kernel_report.nvcc()


@pytest.fixture(scope="module")
def fresh(nvcc):
    """The report of this checkout's kernels; compiling with warnings as errors is part of making it."""
    return kernel_report.report()


@pytest.fixture(scope="module")
def locked(nvcc):
    known = json.loads(kernel_report.LOCK.read_text())
    version = kernel_report.nvcc_version()
    if version not in known:
        pytest.skip(f"cuda: the lock file knows {', '.join(known)}, not {version}; {LOCK_HELP}")
    return known[version]


@pytest.mark.parametrize("arch", kernel_report.ARCHS)
def test_no_kernel_needs_more_than_the_lock_file_says(fresh, locked, arch):
    found = fresh[f"sm_{arch}"]
    if not kernel_report.cuobjdump():
        found = {name: {k: v for k, v in kernel.items() if "_per_" not in k} for name, kernel in found.items()}
    grown = kernel_report.growth(locked[f"sm_{arch}"], found)
    assert not grown, "\n".join([*grown, LOCK_HELP])


@pytest.mark.parametrize("arch", kernel_report.ARCHS)
def test_no_kernel_spills_or_has_a_stack(fresh, arch):
    assert {n: k for n, k in fresh[f"sm_{arch}"].items() if k["spill"] or k["stack"]} == {}


@pytest.mark.parametrize("arch", kernel_report.ARCHS)
def test_hot_loops_spend_their_issue_slots_on_work(fresh, arch):
    """float32 screen: 64 multiply-adds need 4 reads from shared memory, so 1.06 is the floor; 1.25 leaves room for
    the copies.
    """
    if not kernel_report.cuobjdump():
        pytest.skip("cuda: no cuobjdump (CUDA toolkit or triton wheel), so instructions are not counted")
    assert 1.0 < fresh[f"sm_{arch}"]["nearest_screen_kernel"]["instructions_per_multiply-add"] <= 1.25


def test_the_hopper_loop_hides_its_argmin(fresh):
    """At most 4 instructions per score, the copies' bookkeeping, uniform ones and the certificate's top 2 included."""
    if not kernel_report.cuobjdump():
        pytest.skip("cuda: no cuobjdump (CUDA toolkit or triton wheel), so instructions are not counted")
    shapes = {
        n: k["instructions_per_score"] for n, k in fresh["sm_90a"].items() if n.startswith("nearest_hopper_kernel")
    }
    assert len(shapes) == 3 and all(1.0 < value <= 4.0 for value in shapes.values()), shapes


def test_the_gate_sees_growth():
    before = {"a": {"registers": 32, "spill": 0, "instructions_per_score": 3.5}, "gone": {"registers": 1}}
    after = copy.deepcopy(before)
    after["a"].update(registers=33, spill=4, instructions_per_score=3.51)
    after["new"] = after.pop("gone")
    assert len(kernel_report.growth(before, after)) == 5
    after["a"].update(registers=31, spill=0, instructions_per_score=3.4)
    assert len(kernel_report.growth(before, after)) == 2


def test_the_report_reads_what_ptxas_and_cuobjdump_print():
    ptxas = (
        "ptxas info    : Compiling entry function '_ZN2vq13gather_kernelImEEvNS_13GatherProblemE' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 26 registers, used 1 barriers, 512 bytes smem, 564 bytes cmem[0]\n"
    )
    assert kernel_report.resources(ptxas) == {
        "gather_kernel<m>": {"registers": 26, "stack": 8, "spill": 16, "shared": 512}
    }
    code = [
        (0, "MOV", ""),
        (16, "FFMA", ""),
        (32, "IADD3", ""),
        (48, "FFMA", ""),
        (64, "BRA", "0x10"),
        (80, "LDG", ""),
        (96, "BRA", "0x0"),
    ]
    assert kernel_report.hot_loop(code, "FFMA") == ["FFMA", "IADD3", "FFMA", "BRA"]


def test_the_file_that_knows_torch_compiles_without_a_warning(nvcc, tmp_path):
    """register_cuda.cpp against this torch, which need not have CUDA; nothing newer than torch 2.11's stable ABI
    is used.
    """
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-fPIC",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    command = [
        *nvcc,
        *flags,
        f"-I{CSRC}",
        "-isystem",
        include,
        "-c",
        CSRC / "register_cuda.cpp",
        "-o",
        tmp_path / "register.o",
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bench/gpu_micro -------------------------------------------------------------------------------------------

OPCODES = ("FFMA", "LOP3", "VIMNMX", "VIMNMX3", "VIADDMNMX", "VHMNMX", "FMNMX")
PER_LOOP = 4 * 16  # rounds in one turn of the unrolled loop, times chains


@pytest.fixture
def gpu_micro(monkeypatch):
    monkeypatch.syspath_prepend(str(CSRC.parent / "bench"))
    import gpu_micro

    return gpu_micro


@pytest.mark.parametrize("arch", kernel_report.ARCHS)
def test_microbenchmarks_compile_to_the_instructions_that_they_name(nvcc, gpu_micro, tmp_path, arch):
    cubin = tmp_path / "gpu_micro.cubin"
    words = [*gpu_micro.command(nvcc, cubin, arch), "-cubin"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if arch != "90a" or not kernel_report.cuobjdump():
        return
    counts = {name: collections.Counter(op.split(".")[0] for _, op, _ in code) for name, code in kernel_report.sass(cubin).items()}
    for kernel in ("rate_kernel", "beside_kernel"):
        for opcode in OPCODES:
            (found,) = [count for name, count in counts.items() if f"{kernel}INS_{len(opcode)}{opcode.capitalize()}E" in name]
            assert PER_LOOP <= found[opcode] <= PER_LOOP + 48, f"{kernel} {opcode}: {found}"
            assert ("HGMMA" in found) == (kernel == "beside_kernel")
            others = {other for other in OPCODES if other not in (opcode, "LOP3", "FFMA") and found[other] > 4}
            assert not others, f"{kernel} {opcode} is made of {others} too"


def test_microbenchmarks_fail_where_they_refute_a_bound(gpu_micro):
    error = {"what": "mma: largest error of one k16 step", "value": 2.0, "unit": "2^-23 of the magnitudes"}
    assert gpu_micro.verdict([error]) == {"state": "passed"}
    for value in (18.5, float("nan")):
        assert gpu_micro.verdict([{**error, "value": value}])["state"] == "failed"
    outcome = gpu_micro.verdict([error, {"what": "nearest: wrong codes", "value": 3, "unit": "rows"}])
    assert outcome["state"] == "failed" and "wrong codes" in outcome["why"]


def test_microbenchmarks_say_that_they_need_a_gpu():
    done = subprocess.run([sys.executable, str(CSRC.parent / "bench" / "gpu_micro.py")], capture_output=True, text=True, timeout=60,
                          env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "skipped: microbenchmarks need a GPU", done.stdout + done.stderr

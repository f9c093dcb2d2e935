"""Builds what the CUDA tests run: the executor's drills, the whole CUDA backend on the executor, and nvcc's own output.

Everything is compiled once per source text and kept in the temporary folder of this user, so that a second run starts
at once.
"""

import ctypes
import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"vqfast-tests-{getpass.getuser()}"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX = ["g++", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
# The sanitizers halt at the first finding. Alignment of a float inside a view is the caller's business, as on a GPU.
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sources() -> list[Path]:
    """All files under csrc/cuda and csrc/testing, and the file that registers the ops."""
    found = [
        p
        for folder in ("cuda", "testing")
        for p in (CSRC / folder).iterdir()
        if p.suffix in (".h", ".cuh", ".cu", ".cpp")
    ]
    return sorted([*found, CSRC / "register_cuda.cpp"])


def compiled(name: str, *commands: list[str]) -> Path:
    """Run compiler commands that write `{out}` (and `{out}.*`), unless this text was compiled with them before."""
    text = "\n".join(
        [" ".join(map(str, c)) for c in commands]
        + [torch.__version__]
        + [p.read_text() for p in sources() if p.exists()]
    )
    folder = CACHE / hashlib.sha256(text.encode()).hexdigest()[:20]
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = folder / f"{os.getpid()}.{name}"
    for command in commands:
        done = subprocess.run([str(c).replace("{out}", str(partial)) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    os.replace(partial, target)
    return target


@pytest.fixture(scope="session")
def need_gxx():
    if shutil.which("g++") is None:
        pytest.skip("native: no g++, so the CUDA kernels cannot be executed on the CPU")


@pytest.fixture(scope="session")
def drills(need_gxx):
    """`drills(name, order, flavour)` runs one drill; flavours: plain, sanitized, ucontext."""
    flags = {"plain": ["-O1"], "sanitized": ["-O1", *SANITIZE], "ucontext": ["-O1", "-DVQFAST_EXECUTOR_UCONTEXT"]}

    def run(name: str, order: str = "ascending", flavour: str = "plain") -> subprocess.CompletedProcess:
        command = [*CXX, *flags[flavour], "-DVQFAST_EXECUTOR", CSRC / "testing" / "drills.cpp", "-o", "{out}"]
        binary = compiled(f"drills-{flavour}", command)
        environment = {**os.environ, "VQFAST_EXECUTOR_ORDER": order, "LD_PRELOAD": ""}
        return subprocess.run([binary, name], env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="session")
def executor_library(need_gxx):
    """`executor_library(sanitized=False)`: the whole CUDA backend, register_cuda.cpp included, on the executor."""

    def build(sanitized: bool = False) -> Path:
        torch_folder = Path(torch.__file__).parent
        flags = [
            *CXX,
            "-Wno-unknown-pragmas",
            "-fPIC",
            "-DVQFAST_EXECUTOR",
            TARGET,
            "-isystem",
            torch_folder / "include",
        ]
        # A fused multiply-add in hardware is the same operation as the C library's, and faster.
        has_fma = " fma " in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
        flags += ["-O1", *SANITIZE] if sanitized else ["-O2"]
        flags += ["-mfma"] if has_fma else []
        files = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "testing" / "probe.cpp", CSRC / "register_cuda.cpp"]
        objects = [f"{{out}}.{file.name}.o" for file in files]
        commands = [[*flags, "-x", "c++", "-c", file, "-o", o] for file, o in zip(files, objects, strict=True)]
        link = [
            *flags,
            "-shared",
            *objects,
            f"-L{torch_folder / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        return compiled(f"vqfast-executor{'-sanitized' * sanitized}.so", *commands, [*link, "-o", "{out}"])

    return build


@pytest.fixture(scope="session")
def executor(executor_library):
    """torch.ops.vqfast, whose `*_cuda` ops take CPU tensors and run on the executor; `executor.probe` is probe.cpp."""
    path = executor_library()
    torch.ops.load_library(str(path))
    ops = SimpleNamespace(probe=ctypes.CDLL(str(path)))
    ops.probe.vqfast_cuda_hopper_allow(1)  # and VQFAST_EXECUTOR_HOPPER decides
    for name in (
        *("nearest", "gather", "code_stats", "quantize"),
        *("masked_conv", "masked_conv_backward", "gate", "gate_backward"),
    ):
        setattr(ops, name, getattr(torch.ops.vqfast, f"{name}_cuda"))
    ops.ema_update_ = torch.ops.vqfast.ema_update_cuda_
    return ops


@pytest.fixture
def few_rows(executor):
    """The search for few rows, which is off by default."""
    before = executor.probe.vqfast_cuda_few_rows_allow(1)
    yield
    executor.probe.vqfast_cuda_few_rows_allow(before)


@pytest.fixture(params=["float32 screen", "Hopper screen", "few rows"])
def search(request, monkeypatch):
    """Every way to search: the same codes and distances."""
    monkeypatch.setenv("VQFAST_EXECUTOR_HOPPER", "1" if request.param == "Hopper screen" else "0")
    if request.param == "few rows":
        request.getfixturevalue("few_rows")
    return request.param


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    """Threads and blocks run in this order: what needs a barrier that is not there is wrong in one of the two."""
    monkeypatch.setenv("VQFAST_EXECUTOR_ORDER", request.param)
    return request.param

"""Builds what the CUDA tests run: the executor's drills, the whole CUDA backend on the executor, and nvcc's own output.

Everything is compiled once per source text and kept in the temporary folder of this user, so that a second run starts at once.
"""

import getpass
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"vqfast-tests-{getpass.getuser()}"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX = ["g++", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
# The sanitizers halt at the first finding. Alignment of a float inside a view is the caller's business, as on a GPU.
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = ("ascending", "descending")


def sources() -> list[Path]:
    """All files under csrc/cuda and csrc/testing, and the file that registers the ops."""
    found = [p for folder in ("cuda", "testing") for p in (CSRC / folder).iterdir() if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    return sorted([*found, CSRC / "register_cuda.cpp"])


def compiled(name: str, *commands: list[str]) -> Path:
    """Run compiler commands that write `{out}` (and `{out}.*`), unless this text was compiled with them before."""
    text = "\n".join([" ".join(map(str, c)) for c in commands] + [torch.__version__] + [p.read_text() for p in sources() if p.exists()])
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

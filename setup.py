"""Builds vqfast: Python packages and up to three native libraries. Metadata stands in pyproject.toml.

    vqfast/_C_cpu.so    CPU kernels; LibTorch stable ABI, no Python.h: one file for every Python and every torch >= 2.11
    vqfast/_C_cuda.so   CUDA kernels, the same way; built when torch has CUDA and nvcc is there
    vqfast/_C.*.so      pybind11 module with build facts; built when Python.h and pybind11 are there

VQFAST_BUILD=cpu|cuda|none asks for something definite: what was asked for and fails is an error. Unset: what this
machine can. Other switches: VQFAST_WERROR=1 (warnings are errors), VQFAST_CXXFLAGS (more flags for compiler and
linker), VQFAST_CUDA_ARCHS ("90a", or "80 90a"), CXX, NVCC, MAX_JOBS.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"vqfast needs setuptools >= 77, this is {setuptools.__version__}: pip install -U setuptools")
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (absent from old setuptools)

ROOT = Path(__file__).resolve().parent
# Our folder kernels/ must not hide the package `kernels` from PyPI, whose plugin setuptools loads where it is installed.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
CSRC = ROOT / "csrc"
MODE = os.environ.get("VQFAST_BUILD") or "auto"
WERROR = os.environ.get("VQFAST_WERROR", "0") not in ("", "0")
TORCH_TARGET = "0x020b000000000000"  # oldest torch whose stable ABI we may use: 2.11
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_MAC = sys.platform == "darwin"

# No -march=native and no fast-math: one binary runs everywhere, and the contract needs NaN, Inf and every rounding.
EXACT = ["-ffp-contract=off"]
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", *EXACT, "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# GCC 12 warns about its own intrinsics header (bug 105593).
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SIMD_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": AVX512,
    "_avx512vnni": [*AVX512, "-mavx512vnni"],
}
INEXACT = ("-Ofast", "-ffast-math", "-funsafe-math", "-fassociative-math", "-ffinite-math", "-ffp-contract", "-march")
CUDA_ARCHS = ["80", "90a", "100"]  # the newest also as PTX, for devices that do not exist yet

NO_TORCH = """vqfast builds against the torch that you have, and none is to be seen here. Install torch (2.11 or later)
first, then
    pip install --no-build-isolation ...
or set VQFAST_BUILD=none for a package without native libraries."""
NO_COMPILER = """vqfast: no C++ compiler found, so this package has no native libraries and runs on the slower reference
backend. For the fast one: apt install g++, then install again."""
NO_BINDINGS = """vqfast: Python.h (apt install python3-dev) or pybind11 is not here, so vqfast._C is left out."""


# ---- what this machine has -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    torch: object  # the module, or None
    cxx: list[str]  # commands; empty when there is none
    nvcc: list[str]

    @property
    def torch_include(self) -> list[str]:
        return ["-isystem", str(Path(self.torch.__file__).parent / "include")]

    @property
    def torch_link(self) -> list[str]:
        """To stand after the objects, or g++ drops the libraries.

        libtorch is named although nothing of it is used, so that on a CUDA torch its CUDA half is in scope. No rpath:
        torch is always loaded before these libraries.
        """
        folder = Path(self.torch.__file__).parent / "lib"
        return [f"-L{folder}", *([] if IS_MAC else ["-Wl,--no-as-needed"]), "-ltorch", "-ltorch_cpu", "-lc10"]


def find_tools() -> Tools:
    torch = None
    if MODE != "none" and find_spec("torch") is not None:
        import torch
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = [f"{cuda_home}/bin/nvcc"] if cuda_home else []
    return Tools(torch, find_command("CXX", "g++", "c++", "clang++"), find_command("NVCC", *nvcc, "nvcc"))


def find_command(variable: str, *candidates: str) -> list[str]:
    """The command in an environment variable, else the first candidate that exists, else []."""
    command = shlex.split(os.environ.get(variable, ""))
    if command:
        return command if shutil.which(command[0]) else []
    return next(([path] for path in map(shutil.which, candidates) if path), [])


def extra_flags() -> list[str]:
    flags = shlex.split(os.environ.get("VQFAST_CXXFLAGS", ""))
    bad = [flag for flag in flags if flag.startswith(INEXACT)]
    if bad:
        raise SystemExit(f"vqfast: VQFAST_CXXFLAGS may not hold {' '.join(bad)}: results must not depend on it.")
    return flags


# ---- the compiler calls of each library ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One compiler call; one that compiles also writes the depfile `output`.d."""

    command: list[str]
    inputs: list[str]
    output: str
    compiles: bool = False


def compile_step(command: list[str], source: Path, build: Path) -> Step:
    output = f"{build / source.relative_to(CSRC)}.o"
    command = [*command, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", output]
    return Step(command, [str(source)], output, compiles=True)


def link_step(command: list[str], compiled: list[Step], libraries: list[str], output: Path) -> Step:
    objects = [step.output for step in compiled]
    return Step([*command, *objects, *libraries, "-o", str(output)], objects, str(output))


def warning_flags() -> list[str]:
    return ["-Wall", "-Wextra", *(["-Werror"] if WERROR else [])]


def cpu_steps(tools: Tools, build: Path, library: Path) -> list[Step]:
    sources = sorted([*CSRC.glob("register_cpu*.cpp"), *CSRC.glob("cpu/*.cpp")])
    flags = [*CXX_FLAGS, *warning_flags(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{CSRC}", *tools.torch_include]
    if not IS_X86:
        sources = [source for source in sources if not source.stem.endswith(tuple(SIMD_FLAGS))]
        flags.append("-DVQFAST_NO_X86")
    steps = []
    for source in sources:
        wide = next((SIMD_FLAGS[suffix] for suffix in SIMD_FLAGS if source.stem.endswith(suffix)), [])
        steps.append(compile_step([*tools.cxx, *flags, *wide, *extra_flags()], source, build))
    return [*steps, link_step([*tools.cxx, "-shared", *extra_flags()], steps, tools.torch_link, library)]


def cuda_steps(tools: Tools, build: Path, library: Path) -> list[Step]:
    sources = sorted([*CSRC.glob("register_cuda*.cpp"), *CSRC.glob("cuda/*.cu")])
    host = ["-fPIC", *EXACT, "-fvisibility=hidden", "-Wall"]
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{CSRC}"]
    flags += [*tools.torch_include, *cuda_arch_flags(tools.nvcc), f"-Xcompiler={','.join(host)}"]
    flags += ["-Werror", "all-warnings"] if WERROR else []
    steps = [compile_step([*tools.nvcc, *flags], source, build) for source in sources]
    libraries = [flag.replace("-Wl,", "-Xlinker=") for flag in tools.torch_link]
    # cudart inside: a shared one would tie the library to the CUDA major version of torch.
    return [*steps, link_step([*tools.nvcc, "-shared", "-cudart", "static"], steps, libraries, library)]


def cuda_arch_flags(nvcc: list[str]) -> list[str]:
    """For the architectures that were asked for, or those of CUDA_ARCHS that this nvcc knows."""
    known = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = os.environ.get("VQFAST_CUDA_ARCHS", "").split()
    archs = archs or [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('a')}" in known]
    newest = archs[-1].rstrip("a")
    real = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*real, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def bindings_steps(tools: Tools, build: Path, library: Path) -> list[Step]:
    import pybind11

    version = subprocess.run([*tools.cxx, "--version"], capture_output=True, text=True, check=True).stdout
    facts = {
        "COMPILER": version.splitlines()[0],
        "FLAGS": shlex.join([*CXX_FLAGS, *extra_flags()]),
        "TORCH": tools.torch.__version__,
        "TORCH_TARGET": TORCH_TARGET,
        "LEVELS": "scalar,avx2,avx512,avx512vnni" if IS_X86 else "scalar",
    }
    lines = [f"#define VQFAST_{name} {json.dumps(value)}" for name, value in facts.items()]
    write_if_changed(build / "build_facts.h", "\n".join(["#pragma once", *lines, ""]))
    include = [f"-I{build}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    flags = [*CXX_FLAGS, *warning_flags(), *include, *extra_flags()]
    step = compile_step([*tools.cxx, *flags], CSRC / "bindings.cpp", build)
    undefined = ["-undefined", "dynamic_lookup"] if IS_MAC else []
    return [step, link_step([*tools.cxx, "-shared", *extra_flags(), *undefined], [step], [], library)]


# ---- running them --------------------------------------------------------------------------------------------------


def run_steps(steps: list[Step], build: Path) -> None:
    """Run in parallel: with ninja, which redoes only what changed, or without it, which redoes everything."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    for step in steps:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja:
        write_if_changed(build / "build.ninja", ninja_file(steps, build))
        subprocess.run([ninja, "-f", str(build / "build.ninja"), "-j", str(jobs)], check=True)
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda step: subprocess.run(step.command, check=True), [s for s in steps if s.compiles]))
    for step in steps:
        if not step.compiles:
            subprocess.run(step.command, check=True)


def ninja_file(steps: list[Step], build: Path) -> str:
    def escape(path: str) -> str:
        return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [f"builddir = {escape(str(build))}", "rule link", "  command = $cmd"]
    lines += ["rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    for step in steps:
        rule = "compile" if step.compiles else "link"
        lines += [f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}"]
        lines += [f"  cmd = {shlex.join(step.command).replace('$', '$$')}"]
    return "\n".join([*lines, ""])


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ---- setuptools ----------------------------------------------------------------------------------------------------

STEPS = {"vqfast._C_cpu": cpu_steps, "vqfast._C_cuda": cuda_steps, "vqfast._C": bindings_steps}


def choose_libraries(tools: Tools) -> list[str]:
    """Names of the libraries to build. Never fails, so that an sdist can be made anywhere: the build complains."""
    if MODE == "none":
        return []
    if MODE == "auto" and tools.torch and not tools.cxx:
        print(NO_COMPILER, file=sys.stderr)
        return []
    names = ["vqfast._C_cpu"]
    if MODE == "cuda" or (MODE == "auto" and tools.nvcc and tools.torch and tools.torch.version.cuda):
        names.append("vqfast._C_cuda")
    if find_spec("pybind11") and (Path(sysconfig.get_path("include")) / "Python.h").exists():
        names.append("vqfast._C")
    else:
        print(NO_BINDINGS, file=sys.stderr)
    return names


class BuildNative(build_ext):
    """setuptools places the files (wheel, editable or in place); the compiling is ours."""

    def run(self) -> None:
        if self.extensions and TOOLS.torch is None:
            raise SystemExit(NO_TORCH)
        if self.extensions and not TOOLS.cxx:
            raise SystemExit(f"vqfast: VQFAST_BUILD={MODE} asks for a C++ compiler: apt install g++, or set CXX.")
        if MODE == "cuda" and not TOOLS.nvcc:
            raise SystemExit("vqfast: VQFAST_BUILD=cuda asks for nvcc: install the CUDA toolkit, or set CUDA_HOME.")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_C":
            return super().get_ext_filename(fullname)
        return fullname.replace(".", os.sep) + ".so"  # no Python tag: not a Python module

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / self.get_finalized_command("build").build_base / "native" / ext.name
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            run_steps(STEPS[ext.name](TOOLS, build, build / target.name), build)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"vqfast: building {ext.name} failed, see the compiler's messages above.") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(build / target.name, target)


class Wheel(bdist_wheel):
    """A wheel without vqfast._C holds nothing that depends on the Python version, and its tag says so."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        tied = any(ext.name == "vqfast._C" for ext in self.distribution.ext_modules or [])
        return (python, abi, plat) if tied else ("py3", "none", plat)


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"vqfast: VQFAST_BUILD={MODE!r} is not known; use cpu, cuda or none, or unset it.")
TOOLS = find_tools()

setup(
    packages=[*find_packages(include=["vqfast", "vqfast.*"]), "vqfast.kernels"],
    package_dir={"vqfast.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[]) for name in choose_libraries(TOOLS)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)

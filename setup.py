"""Builds vqfast: Python packages and up to three native libraries. Metadata stands in pyproject.toml.

    vqfast/_C_cpu.so    CPU kernels; LibTorch stable ABI, no Python.h: one file serves every Python and every torch >= 2.11
    vqfast/_C_cuda.so   CUDA kernels, the same way; built when torch has CUDA and nvcc is there
    vqfast/_C.*.so      pybind11 module with build facts; built when Python.h and pybind11 are there

VQFAST_BUILD=cpu|cuda|none asks for something definite: what was asked for and fails is an error. Unset means: what this machine can.
Other switches: VQFAST_WERROR=1 (warnings are errors), VQFAST_CXXFLAGS (more compiler and linker flags), VQFAST_CUDA_ARCHS ("90a" or
"80 90a"), CXX, NVCC, MAX_JOBS.
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
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"vqfast needs setuptools 77 or later to build, this is {setuptools.__version__}: pip install -U setuptools")
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (absent from old setuptools)

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("VQFAST_BUILD", "") or "auto"
WERROR = os.environ.get("VQFAST_WERROR", "0") not in ("", "0")
TORCH_TARGET = "0x020b000000000000"  # oldest torch whose stable ABI we may use: 2.11
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# No -march=native and no fast-math: the binary must run everywhere, and the contract needs NaN, Inf and every rounding as written.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
SIMD_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # GCC 12 warns about its own intrinsics header (bug 105593).
    + ["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}
CUDA_ARCHS = ["80", "90a", "100"]  # the newest also as PTX, for devices that do not exist yet

NO_TORCH = (
    "vqfast builds against the torch that you have, and none is to be seen here. Install torch (2.11 or later) first, then run\n"
    "    pip install --no-build-isolation <the same arguments>\n"
    "or set VQFAST_BUILD=none for a package without native libraries."
)
NO_COMPILER = "vqfast: no C++ compiler found, so this package has no native libraries and runs on the slower reference backend (apt install g++)."


def extra_flags() -> list[str]:
    flags = shlex.split(os.environ.get("VQFAST_CXXFLAGS", ""))
    bad = [f for f in flags if f in ("-Ofast", "-ffast-math", "-funsafe-math-optimizations") or f.startswith(("-march", "-ffp-contract"))]
    if bad:
        raise SystemExit(f"vqfast: VQFAST_CXXFLAGS may not hold {' '.join(bad)}: results must be the same on every machine.")
    return flags


def find_tool(variable: str, *candidates: str) -> list[str]:
    """The command in an environment variable, else the first candidate on PATH, else []."""
    if os.environ.get(variable):
        command = shlex.split(os.environ[variable])
        return command if shutil.which(command[0]) else []
    return next(([path] for path in map(shutil.which, candidates) if path), [])


@dataclass(frozen=True)
class Toolchain:
    """What this machine has to build with."""

    torch: object = None
    cxx: list[str] = field(default_factory=list)
    nvcc: list[str] = field(default_factory=list)

    @staticmethod
    def find() -> "Toolchain":
        torch = None
        if MODE != "none" and find_spec("torch") is not None:
            import torch
        cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = find_tool("NVCC", *([f"{cuda_home}/bin/nvcc"] if cuda_home else []), "nvcc")
        return Toolchain(torch, find_tool("CXX", "g++", "c++", "clang++"), nvcc)

    @property
    def torch_include(self) -> list[str]:
        return ["-isystem", str(Path(self.torch.__file__).parent / "include")]

    @property
    def torch_link(self) -> list[str]:
        # After the objects, or g++ drops the libraries. libtorch itself is needed by name so that on a CUDA torch its CUDA half is in scope.
        # No rpath: torch is always loaded before these libraries.
        keep = [] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
        return [f"-L{Path(self.torch.__file__).parent / 'lib'}", *keep, "-ltorch", "-ltorch_cpu", "-lc10"]


@dataclass(frozen=True)
class Step:
    """One compiler call: `command` reads `inputs` and writes `output` (and a depfile for ninja when it compiles)."""

    command: list[str]
    inputs: list[str]
    output: str
    compiles: bool = True


def warnings() -> list[str]:
    return ["-Wall", "-Wextra"] + (["-Werror"] if WERROR else [])


def object_path(build: Path, source: Path) -> str:
    return str(build / source.relative_to(ROOT / "csrc")) + ".o"


def cpu_steps(tools: Toolchain, build: Path, library: str) -> list[Step]:
    sources = [ROOT / "csrc/register_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    flags = [*CXX_FLAGS, *warnings(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{ROOT / 'csrc'}", *tools.torch_include]
    if not IS_X86:
        sources = [s for s in sources if not s.stem.endswith(tuple(SIMD_FLAGS))]
        flags.append("-DVQFAST_NO_X86")
    steps = []
    for source in sources:
        output = object_path(build, source)
        simd = next((f for suffix, f in SIMD_FLAGS.items() if source.stem.endswith(suffix)), [])
        command = [*tools.cxx, *flags, *simd, *extra_flags(), "-MD", "-MF", output + ".d", "-c", str(source), "-o", output]
        steps.append(Step(command, [str(source)], output))
    objects = [s.output for s in steps]
    link = [*tools.cxx, "-shared", *extra_flags(), *objects, *tools.torch_link, "-o", library]
    return [*steps, Step(link, objects, library, compiles=False)]


def cuda_archs(nvcc: list[str]) -> list[str]:
    """-gencode flags for the architectures that were asked for, or those of ours that this nvcc knows."""
    known = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    asked = os.environ.get("VQFAST_CUDA_ARCHS", "").split() or [a for a in CUDA_ARCHS if f"compute_{a.rstrip('a')}" in known]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in asked]
    newest = asked[-1].rstrip("a")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_steps(tools: Toolchain, build: Path, library: str) -> list[Step]:
    sources = [ROOT / "csrc/register_cuda.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    host = ["-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *cuda_archs(tools.nvcc)]
    flags += [f"-Xcompiler={','.join(host)}", f"-I{ROOT / 'csrc'}", *tools.torch_include]
    flags += ["-Werror", "all-warnings"] if WERROR else []
    steps = []
    for source in sources:
        output = object_path(build, source)
        command = [*tools.nvcc, *flags, "-MD", "-MF", output + ".d", "-c", str(source), "-o", output]
        steps.append(Step(command, [str(source)], output))
    objects = [s.output for s in steps]
    link_flags = [f"-Xlinker={f[4:]}" if f.startswith("-Wl,") else f for f in tools.torch_link]
    link = [*tools.nvcc, "-shared", "-cudart", "static", *objects, *link_flags, "-o", library]
    return [*steps, Step(link, objects, library, compiles=False)]


def bindings_steps(tools: Toolchain, build: Path, library: str) -> list[Step]:
    import pybind11

    facts = {
        "compiler": subprocess.run([*tools.cxx, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0],
        "flags": " ".join([*CXX_FLAGS, *extra_flags()]),
        "torch": tools.torch.__version__,
        "torch_target": TORCH_TARGET,
        "levels": "scalar,avx2,avx512" if IS_X86 else "scalar",
    }
    header = build / "build_facts.h"
    lines = [f"#define VQFAST_{name.upper()} {json.dumps(value)}" for name, value in facts.items()]
    write_if_changed(header, "#pragma once\n" + "\n".join(lines) + "\n")
    source = ROOT / "csrc/bindings.cpp"
    output = object_path(build, source)
    include = [f"-I{build}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    flags = [*CXX_FLAGS, *warnings(), *include, *extra_flags()]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [
        Step([*tools.cxx, *flags, "-MD", "-MF", output + ".d", "-c", str(source), "-o", output], [str(source)], output),
        Step([*tools.cxx, "-shared", *extra_flags(), *undefined, output, "-o", library], [output], library, compiles=False),
    ]


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_steps(steps: list[Step], build: Path) -> None:
    """Compiles in parallel: with ninja, which redoes only what changed, or with plain threads, which redo all."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    for step in steps:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja:
        file = build / "build.ninja"
        write_if_changed(file, ninja_text(steps))
        subprocess.run([ninja, "-f", str(file), "-j", str(jobs)], check=True)
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda s: subprocess.run(s.command, check=True), [s for s in steps if s.compiles]))
    for step in steps:
        if not step.compiles:
            subprocess.run(step.command, check=True)


def ninja_text(steps: list[Step]) -> str:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $cmd", "rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    for step in steps:
        rule = "compile" if step.compiles else "run"
        lines += [f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}"]
        lines += ["  cmd = " + shlex.join(step.command).replace("$", "$$")]
    return "\n".join(lines) + "\n"


LIBRARIES = {"vqfast._C_cpu": cpu_steps, "vqfast._C_cuda": cuda_steps, "vqfast._C": bindings_steps}


def choose_libraries(tools: Toolchain) -> list[str]:
    """Names of the libraries to build. Nothing fails here, so that an sdist can be made anywhere; the build itself complains."""
    if MODE == "none":
        return []
    if MODE == "auto" and not tools.cxx and tools.torch is not None:
        print(NO_COMPILER, file=sys.stderr)
        return []
    names = ["vqfast._C_cpu"]
    if MODE == "cuda" or (MODE == "auto" and tools.nvcc and tools.torch is not None and tools.torch.version.cuda):
        names.append("vqfast._C_cuda")
    if find_spec("pybind11") and (Path(sysconfig.get_path("include")) / "Python.h").exists():
        names.append("vqfast._C")
    else:
        print("vqfast: Python.h (apt install python3-dev) or pybind11 is not here: vqfast._C, the build facts, is left out.", file=sys.stderr)
    return [name for name in names if (ROOT / "csrc" / SOURCE_OF[name]).exists()]


SOURCE_OF = {"vqfast._C_cpu": "register_cpu.cpp", "vqfast._C_cuda": "register_cuda.cpp", "vqfast._C": "bindings.cpp"}


class BuildNative(build_ext):
    """setuptools places the files (wheel, editable or in place); the compiling is ours."""

    def run(self) -> None:
        if self.extensions and TOOLS.torch is None:
            raise SystemExit(NO_TORCH)
        if self.extensions and not TOOLS.cxx:
            raise SystemExit(f"vqfast: VQFAST_BUILD={MODE} was asked for, but there is no C++ compiler (apt install g++, or set CXX).")
        if MODE == "cuda" and not TOOLS.nvcc:
            raise SystemExit("vqfast: VQFAST_BUILD=cuda was asked for, but there is no nvcc (set CUDA_HOME or NVCC).")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_C":
            return super().get_ext_filename(fullname)
        return fullname.replace(".", os.sep) + ".so"  # no Python tag: not a Python module

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        build = ROOT / self.get_finalized_command("build").build_base / "native" / name
        target = Path(self.get_ext_fullpath(ext.name))
        library = build / target.name
        try:
            run_steps(LIBRARIES[ext.name](TOOLS, build, str(library)), build)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"vqfast: building {ext.name} failed, see the compiler's messages above.") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, never one written over: a running process may have the old one mapped.
        shutil.copy2(library, f"{target}.new")
        os.replace(f"{target}.new", target)


class Wheel(bdist_wheel):
    """A wheel without vqfast._C holds nothing that depends on the Python version, and its tag says so."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        tied = any(ext.name == "vqfast._C" for ext in self.distribution.ext_modules or [])
        return (python, abi, plat) if tied else ("py3", "none", plat)


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"vqfast: VQFAST_BUILD={MODE!r} is unknown; it may be cpu, cuda, none, or unset for what this machine can.")
TOOLS = Toolchain.find()

setup(
    packages=[*find_packages(include=["vqfast", "vqfast.*"]), "vqfast.kernels"],
    package_dir={"vqfast.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[]) for name in choose_libraries(TOOLS)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)

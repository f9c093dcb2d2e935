"""What a user installs: sdist and wheel, with and without a compiler, imported far away from this repository."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import vqfast

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")
USE = """
import torch, vqfast
x, codebook = torch.randn(1000, 16), torch.randn(50, 16)
for _ in range(3):
    found = vqfast.nearest(x, codebook)
    out = vqfast.vector_quantize(x, codebook)
assert torch.equal(found.indices, torch.cdist(x.double(), codebook.double()).argmin(1))
assert torch.equal(out.quantized, codebook[found.indices])
print("runs on", vqfast.explain("nearest", x, codebook).split()[3], "from", vqfast.__file__)
"""


def run(*command, env=None, cwd="/", check=True) -> subprocess.CompletedProcess:
    done = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without our own switches, but for VQFAST_WERROR."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VQFAST_") or k == "VQFAST_WERROR"}
    return kept | variables


def without_compiler(folder: Path) -> dict[str, str]:
    """An environment whose PATH leads to no compiler at all."""
    folder.mkdir(exist_ok=True)
    env = environment(PATH=str(folder))
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH"):
        env.pop(name, None)
    return env


def build_wheel(source: Path, target: Path, env: dict[str, str]) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target, source, env=env)
    (wheel,) = target.glob("*.whl")
    return wheel


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def install(wheel: Path, folder: Path) -> Path:
    """Python of a clean virtual environment that holds the wheel, and sees this one's torch but not its vqfast."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python3*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (site / "torch_of_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the tree without anything built: building must not write into the tree under test."""
    folder = tmp_path_factory.mktemp("source") / "vqfast"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "shared")
    shutil.copytree(ROOT, folder, ignore=built)
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    # None for torch: an sdist must not need it.
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    run(sys.executable, "-c", code, "-q", "sdist", "-d", target, cwd=sources, env=environment())
    (archive,) = target.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel built from the sdist, so that a file missing from the sdist shows."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("native: no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data") if sys.version_info >= (3, 12) else archive.extractall(folder)
    (source,) = folder.iterdir()
    return build_wheel(source, folder, environment(VQFAST_BUILD="cpu"))


def test_the_version_stands_in_one_place():
    assert importlib.metadata.version("vqfast") == vqfast.__version__


def test_the_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["csrc", "kernels", "tests", "vqfast"]
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh", ".jpg", ".toml", ".typed")
    files = {p.relative_to(ROOT).as_posix() for f in wanted for p in (ROOT / f).rglob("*") if p.suffix in suffixes}
    files |= {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}
    assert files - held == set()


@pytest.mark.slow
def test_a_wheel_holds_vqfast_only(wheel):
    held = names(wheel)
    assert {name.split("/")[0] for name in held} == {"vqfast", f"vqfast-{vqfast.__version__}.dist-info"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vqfast").rglob("*.py")}
    modules |= {"vqfast/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    files = [p for p in (ROOT / "vqfast").rglob("*") if p.suffix in (".jpg", ".toml", ".json", ".md")]
    data = {p.relative_to(ROOT).as_posix() for p in files}
    assert (modules | data | {"vqfast/py.typed", "vqfast/_C_cpu.so"}) - set(held) == set()


@pytest.mark.slow
def test_the_tag_of_a_wheel_is_honest(wheel):
    tied = any(re.match(r"vqfast/_C\.", name) for name in names(wheel))
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (abi == "none") == (not tied) and (python == "py3") == (not tied)
    assert platform != "any"


@pytest.mark.slow
def test_an_installed_wheel_runs_natively_from_another_folder(wheel, tmp_path):
    python = install(wheel, tmp_path / "env")
    done = run(python, "-W", "error", "-c", USE, env=environment(), cwd=tmp_path)
    assert done.stdout.startswith(f"runs on cpu from {tmp_path}"), done.stdout
    for name in ("kernels", "csrc", "bench", "tests"):  # PyPI has a `kernels` too, which may be installed beside
        code = f"from importlib.util import find_spec; found = find_spec({name!r}); print(found and found.origin)"
        assert str(tmp_path / "env") not in run(python, "-c", code, cwd=tmp_path).stdout
    assert (tmp_path / "env/bin/vqfast").exists()
    run(python, "-c", "import vqfast.kernels", cwd=tmp_path)


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_once_that_it_runs_on_the_reference(sources, tmp_path):
    env = without_compiler(tmp_path / "bin")
    wheel = build_wheel(sources, tmp_path, env)
    assert wheel.name.endswith("-py3-none-any.whl") and not [name for name in names(wheel) if name.endswith(".so")]
    done = run(install(wheel, tmp_path / "env"), "-c", USE, env=env, cwd=tmp_path)
    assert done.stdout.startswith("runs on reference")
    assert done.stderr.count("reference backend") == 1 and "g++" in done.stderr


def build_fails(sources, env, prelude="pass") -> str:
    """Runs the build, which must fail, in a way that a sentence explains; returns that sentence."""
    code = f"import sys, runpy; {prelude}; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py')"
    done = run(sys.executable, "-c", code, cwd=sources, env=env, check=False)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_build_that_was_asked_for_and_cannot_be_is_an_error(sources, tmp_path):
    nothing = without_compiler(tmp_path / "bin")
    assert "apt install g++" in build_fails(sources, nothing | {"VQFAST_BUILD": "cpu"})
    assert "CUDA toolkit" in build_fails(sources, nothing | {"VQFAST_BUILD": "cuda", "CXX": sys.executable})
    assert "use cpu, cuda or none" in build_fails(sources, environment(VQFAST_BUILD="fast"))
    assert "-ffast-math" in build_fails(sources, environment(VQFAST_CXXFLAGS="-ffast-math", CXX=sys.executable))


def test_a_compiler_that_fails_is_an_error_even_when_nothing_was_asked_for(sources, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho g++ 1.0\nexit 1\n")
    broken.chmod(0o755)
    env = without_compiler(tmp_path / "bin") | {"CXX": str(broken)}
    assert "see the compiler's messages" in build_fails(sources, env)


def test_without_torch_the_build_names_the_remedy(sources):
    message = build_fails(sources, environment(), "sys.modules['torch'] = None")
    assert "--no-build-isolation" in message and "VQFAST_BUILD=none" in message


# ---- the stable ABI ----------------------------------------------------------------------------------------------


@pytest.fixture
def cpu_library() -> Path:
    path = Path(vqfast.__file__).with_name("_C_cpu.so")
    if not path.exists():
        pytest.skip("native: this vqfast has no _C_cpu")
    return path


def test_the_cpu_library_uses_torch_only_through_the_stable_abi(cpu_library):
    if not shutil.which("nm"):
        pytest.skip("native: nm is missing (apt install binutils)")
    wanted = run("nm", "-D", "--undefined-only", cpu_library).stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in wanted)
    assert [symbol for symbol in wanted if re.match(r"_Z\w*?(2at|3c10|5torch|5caffe2)\d", symbol)] == []
    assert [symbol for symbol in wanted if re.match(r"_?Py[A-Z_]", symbol)] == []


def test_the_cpu_library_needs_no_newer_torch_than_promised(cpu_library):
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.exists():
        pytest.skip("the package torch-abi-audit is not installed")
    report = run(audit, cpu_library, "--check", "torch").stdout
    assert "STABLE" in report
    (oldest,) = re.findall(r"Min torch:\s+(\d+)\.(\d+)", report)
    assert tuple(map(int, oldest)) <= (2, 11)


def test_the_cpu_library_looks_in_no_fixed_folder(cpu_library):
    if not shutil.which("readelf"):
        pytest.skip("native: readelf is missing (apt install binutils)")
    dynamic = run("readelf", "-d", cpu_library).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libtorch.so" in dynamic and "libgomp" not in dynamic

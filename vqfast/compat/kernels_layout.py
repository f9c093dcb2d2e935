"""A folder in the layout of Hugging Face's `kernels`: stateless layers and functions that its loader finds for this machine.

    write_kernel("vqfast-kernel")
    kernel = kernels.get_local_kernel(Path("vqfast-kernel"))
    kernel.nearest(x, codebook); kernel.layers.ImageQuantizer

One variant, for this torch's stable ABI, processor and system, holds this installation of vqfast with its CPU library. A process in which
vqfast is installed uses that one, since the operators `vqfast::*` can be defined once only. Needs nothing but torch to run.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path

_NAME = "vqfast"
_STABLE_ABI = "211"  # the oldest torch whose stable ABI the library needs, without its dot

_INIT = '''"""vqfast, as a kernel: exact nearest codes. See https://pypi.org/project/kernels for the loader."""

import importlib.util
import sys
from pathlib import Path


def _vqfast():
    """The installed vqfast, else the one beside this file."""
    if "vqfast" in sys.modules:
        return sys.modules["vqfast"]
    try:
        import vqfast
    except ModuleNotFoundError:
        folder = Path(__file__).with_name("_bundle") / "vqfast"
        spec = importlib.util.spec_from_file_location(
            "vqfast", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        vqfast = sys.modules["vqfast"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(vqfast)
        except BaseException:
            del sys.modules["vqfast"]
            raise
    return vqfast


_vqfast()

from vqfast import code_stats, ema_update_, gather, nearest, residual_quantize, vector_quantize  # noqa: E402
from vqfast.compat import kernel_layers as layers  # noqa: E402

__all__ = ["code_stats", "ema_update_", "gather", "layers", "nearest", "residual_quantize", "vector_quantize"]
'''


def variant() -> str:
    """Name of this machine's variant, `torch-stable-abi211-cpu-x86_64-linux` say."""
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"torch-stable-abi{_STABLE_ABI}-cpu-{machine}-{system}"


def write_kernel(folder: str | Path) -> Path:
    """Write the kernel's folder for this machine; returns the path of its variant.

    Args:
        folder: the repository to make; made if it is not there. A variant of the same name is replaced.

    Raises:
        RuntimeError: this installation has no CPU library, so that there would be nothing fast to hand on.
    """
    source = Path(__file__).parents[1]
    if not (source / "_C_cpu.so").exists():
        raise RuntimeError("this installation of vqfast has no _C_cpu.so; install a C++ compiler and install vqfast again.")
    target = Path(folder) / "build" / variant()
    shutil.rmtree(target, ignore_errors=True)
    bundle = target / "_bundle" / "vqfast"
    for name in ("compat", "nn", "ops"):
        shutil.copytree(source / name, bundle / name, ignore=shutil.ignore_patterns("__pycache__"))
    modules = [path for path in source.glob("*.py") if path.name != "__main__.py"]
    for path in (*modules, source / "_C_cpu.so"):
        shutil.copy2(path, bundle / path.name)
    (target / "__init__.py").write_text(_INIT)
    metadata = {
        "id": f"_{_NAME}_cpu_{_digest(target)}",
        "name": _NAME,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2))
    return target


def _digest(folder: Path) -> str:
    """Twelve digits that tell one build from another; the loader imports the kernel under a name that holds them."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]

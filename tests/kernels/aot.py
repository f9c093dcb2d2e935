"""Compile every kernel that the host code launches, for GPUs that are not here, and read what the compiler spent.

    python tests/kernels/aot.py             compare with kernels/kernels.lock.json; exit status 1 on growth
    python tests/kernels/aot.py --write     rewrite this Triton version's part of the lock file
    python tests/kernels/aot.py --hip       compile for AMD gfx942 too (no register counts there)

Nothing is listed by hand: the public entries run on small CPU tensors with the launch replaced by a recorder, so that what is compiled is
what they would launch, with the types and specializations that Triton would choose. Needs Triton without TRITON_INTERPRET; no GPU, no driver.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vqfast.kernels import _triton

LOCK = Path(_triton.__file__).with_name("kernels.lock.json")
# Shared memory that one program may take (cudaDevAttrMaxSharedMemoryPerBlockOptin), and multiprocessors, for the choice of tiles.
CUDA = {80: (163 * 1024, 108), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.int16: "*i16", torch.bool: "*i1", torch.uint8: "*u8"}  # fmt: skip


# ---- what would be launched ------------------------------------------------------------------------------------------------


@contextmanager
def recorded(shared_memory: int, processors: int):
    """Collect (kernel, arguments, keywords) instead of launching; the host code believes in a device of this size."""
    launches = []
    before = JITFunction.__getitem__, dict(vars(_triton))
    JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: launches.append((kernel, a, k))
    modules = [m for name, m in sys.modules.items() if name.startswith("vqfast.kernels.")]
    saved = [(m, name, getattr(m, name)) for m in modules for name in ("shared_memory", "processors") if hasattr(m, name)]
    for module, name, _ in saved:
        setattr(module, name, lambda tensor, value={"shared_memory": shared_memory, "processors": processors}[name]: value)
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = before[0]
        for module, name, value in saved:
            setattr(module, name, value)


def source_of(kernel: JITFunction, args: tuple, keywords: dict) -> tuple[ASTSource, dict]:
    """The compiler's input, specialized as Triton's own launcher does: constants, 1 as a constant, divisibility by 16."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in keywords.items() if k in kernel.arg_names}
    options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free and not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes), options


def launches_of_everything(shared_memory: int, processors: int) -> dict[str, tuple]:
    """Label -> launch, for every op, dtype and kind of shape that takes its own path."""
    sys.path.insert(0, str(Path(__file__).parent))
    import launches  # beside this file

    with recorded(shared_memory, processors) as seen:
        found = {}
        for label, run in launches.ALL:
            seen.clear()
            run()
            for launch in seen:
                name = f"{label}/{launch[0].__name__.strip('_').removesuffix('_kernel')}"
                while name in found:  # the same kernel again, in other circumstances
                    name += "+"
                found[name] = launch
    return found


# ---- what the compiler spent -----------------------------------------------------------------------------------------------


def tool(name: str, *words: str) -> str:
    """Output of one of the binary tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *words], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict:
    """Registers per thread, and the instructions that move spilled registers (the stack alone may be that of a division routine)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = re.search(r"Function \w+:\s*\n?\s*REG:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump printed something unexpected:\n{usage}")
    return {"registers": int(found[1]), "spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}


def compile_one(launch: tuple, target: GPUTarget) -> tuple[dict, object]:
    source, options = source_of(*launch)
    compiled = triton.compile(source, target=target, options=options)
    if target.backend != "cuda":
        return {"shared": compiled.metadata.shared}, compiled
    return {**resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}, compiled


def measure(archs, names=None) -> dict[str, dict]:
    """{"sm_90": {label: {"registers", "spills", "shared"}}}; launches that compile to the same code are compiled once."""
    result = {}
    for arch in archs:
        target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
        launches = launches_of_everything(*CUDA.get(arch, (64 * 1024, 304)))
        seen, rows = {}, {}
        for label, launch in launches.items():
            if names and not any(name in label for name in names):
                continue
            source, options = source_of(*launch)
            key = (launch[0].__name__, str(sorted(source.signature.items())), str(source.constants), str(source.attrs), str(options))
            if key not in seen:
                seen[key] = compile_one(launch, target)[0]
                rows[label] = seen[key]
        result[f"sm_{arch}" if isinstance(arch, int) else arch] = rows
    return result


# ---- the lock file ---------------------------------------------------------------------------------------------------------


def version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def differences(measured: dict, locked: dict) -> list[str]:
    """Everything that grew, and every kernel on one side only."""
    found = []
    for arch, rows in measured.items():
        old = locked.get(arch, {})
        found += [f"{arch} {label}: is not in the lock file" for label in rows.keys() - old.keys()]
        found += [f"{arch} {label}: is in the lock file but is no longer launched" for label in old.keys() - rows.keys()]
        for label in rows.keys() & old.keys():
            for what, value in rows[label].items():
                if value > old[label][what]:
                    found.append(f"{arch} {label}: {what} grew from {old[label][what]} to {value}")
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--hip", action="store_true")
    parser.add_argument("--arch", type=int, nargs="*", default=list(CUDA))
    parser.add_argument("--only", nargs="*", help="labels that contain one of these words")
    parser.add_argument("--print", action="store_true", dest="show")
    options = parser.parse_args()
    measured = measure(options.arch, options.only)
    if options.hip:
        measure(["gfx942"], options.only)
    if options.show:
        for arch, rows in measured.items():
            for label, row in rows.items():
                print(f"{arch} {label:60s} registers {row['registers']:4d} spills {row['spills']:5d} shared {row['shared']:7d}")
    lock = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    if options.write:
        old = lock.get(version(), {}) if options.only else {}
        lock[version()] = old | {arch: old.get(arch, {}) | rows for arch, rows in measured.items()}
        LOCK.write_text(json.dumps(lock, indent=1, sort_keys=True) + "\n")
        print(f"wrote {sum(map(len, measured.values()))} kernels of Triton {version()} to {LOCK}")
        return 0
    if version() not in lock:
        print(f"no lock for Triton {version()}; write one with --write")
        return 1
    found = differences(measured, lock[version()]) if not options.only else []
    print("\n".join(found) or f"{sum(map(len, measured.values()))} kernels of Triton {version()} within the lock")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

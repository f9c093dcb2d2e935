"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, and instructions per score in the hot loop.

    python csrc/testing/kernel_report.py            print the report
    python csrc/testing/kernel_report.py --lock     write it to csrc/cuda/kernels.lock.json, for this nvcc

tests/cuda/test_nvcc.py compares a fresh report with the lock file: growth fails. Needs nvcc; the instruction counts
also need
cuobjdump, from the CUDA toolkit or from the triton wheel. No GPU is needed and none is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
LOCK = CSRC / "cuda" / "kernels.lock.json"
ARCHS = ("80", "90a")
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}"]

# kernel (or with its template arguments, as mangled) -> (instruction that marks its hot loop, what one thread gets done
# per such instruction, unit)
HOT_LOOPS = {
    "nearest_screen_kernel": ("FFMA", 1, "multiply-add"),
    "masked_conv_kernel<NS_9FloatMath>": ("FFMA", 1, "multiply-add"),
    "conv_weight_kernel<NS_9FloatMath>": ("FFMA", 1, "multiply-add"),
    "masked_conv_kernel<NS_8HalfMathILb1>": ("HMMA", 1, "mma"),
    "conv_weight_kernel<NS_8HalfMathILb1>": ("HMMA", 1, "mma"),
    "nearest_few_screen_kernel": ("HMMA", 1, "mma"),
    "nearest_hopper_kernel": (
        "VIMNMX3",
        8 / 3,
        "score",
    ),  # 3 of them make the minimum of 8 scores, with the certificate's top 2
}


def nvcc() -> list[str] | None:
    command = os.environ.get("NVCC") or shutil.which("nvcc")
    return command.split() if command else None


def nvcc_version() -> str:
    text = subprocess.run([*nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release (\d+\.\d+)", text)[1]


def cuobjdump() -> str | None:
    beside = Path(shutil.which(nvcc()[0]) or "").resolve().parent / "cuobjdump" if nvcc() else None
    if beside and beside.exists():
        return str(beside)
    if shutil.which("cuobjdump"):
        return shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def compile_cubin(source: Path, arch: str, target: Path) -> str:
    """Compile for one architecture with warnings as errors; returns what ptxas says.

    Raises:
        RuntimeError: nvcc refused; the message holds its output.
    """
    command = [
        *nvcc(),
        *FLAGS,
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-cubin",
        "-o",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    # C75..: ptxas gave up on overlapping wgmma, or on the registers that were asked for.
    if done.returncode or re.search(r"\(C75\d\d\)", done.stdout + done.stderr):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def plain_name(mangled: str) -> str:
    """`_ZN2vq13gather_kernelImE...` -> `gather_kernel<m>`: the name, and the mangled template arguments."""
    found = re.match(r"_ZN2vq(?:12_GLOBAL__N_1)?(\d+)", mangled)
    if not found:
        return mangled
    start, length = found.end(), int(found[1])
    name, rest = mangled[start : start + length], mangled[start + length :]
    arguments = re.match(r"I(.*?)E(?:E|v)", rest)
    return f"{name}<{arguments[1]}>" if arguments else name


def resources(ptxas: str) -> dict[str, dict[str, int]]:
    """Kernel -> registers, spill (bytes stored and loaded), stack and static shared memory (bytes)."""
    found = {}
    for part in ptxas.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }
        values = {key: int(m[1]) if (m := re.search(pattern, part)) else 0 for key, pattern in numbers.items()}
        values["spill"] = values.pop("spill_stores") + values.pop("spill_loads")
        found[plain_name(part.split("'")[0])] = values
    return found


# ---- SASS -----------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def sass(cubin: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Kernel -> (address, opcode, operands) of each instruction."""
    text = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        lines = part.splitlines()
        matches = [INSTRUCTION.match(line) for line in lines]
        found[plain_name(lines[0].strip())] = [(int(m[1], 16), m[2], m[3]) for m in matches if m]
    return found


def hot_loop(code: list[tuple[int, str, str]], mark: str) -> list[str]:
    """Opcodes of the loop in which `mark` is densest, of those that hold at least half as many as any loop."""
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append([op for at, op, _ in code if int(target[1], 16) <= at <= address])
    marks = [sum(op.split(".")[0] == mark for op in loop) for loop in loops]
    worth = [(n / len(loop), loop) for n, loop in zip(marks, loops, strict=True) if n and 2 * n >= max(marks)]
    return max(worth, key=lambda w: w[0])[1] if worth else []


def report(archs=ARCHS) -> dict[str, dict[str, dict]]:
    """Architecture -> kernel -> numbers."""
    found: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            kernels = found.setdefault(f"sm_{arch}", {})
            for source in sources():
                cubin = Path(folder) / f"{source.stem}.{arch}.cubin"
                kernels.update(resources(compile_cubin(source, arch, cubin)))
                if cuobjdump():
                    add_hot_loops(kernels, cubin)
            for name in [n for n, k in kernels.items() if k.get("registers") == 0]:
                del kernels[name]
    return {arch: dict(sorted(kernels.items())) for arch, kernels in found.items()}


def add_hot_loops(kernels: dict[str, dict], cubin: Path) -> None:
    for name, code in sass(cubin).items():
        hot = HOT_LOOPS.get(name) or HOT_LOOPS.get(name.split("<")[0])
        if not hot or name not in kernels:
            continue
        mark, work, unit = hot
        loop = hot_loop(code, mark)
        done = sum(op.split(".")[0] == mark for op in loop) * work
        if done:
            kernels[name][f"instructions_per_{unit}"] = round(len(loop) / done, 3)


def growth(locked: dict[str, dict], fresh: dict[str, dict]) -> list[str]:
    """Sentences about kernels that the lock file does not know, knows and are gone, or that need more than it says."""
    found = [f"{name} is not in the lock file" for name in sorted(fresh.keys() - locked.keys())]
    found += [f"{name} is in the lock file and no longer exists" for name in sorted(locked.keys() - fresh.keys())]
    for name in sorted(locked.keys() & fresh.keys()):
        for key, value in fresh[name].items():
            if value > locked[name].get(key, 0):
                found.append(f"{name}: {key} grew from {locked[name].get(key, 0)} to {value}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", action="store_true", help="write the lock file")
    arguments = parser.parse_args()
    if not nvcc():
        raise SystemExit("kernel_report: no nvcc (put it on PATH, or set NVCC).")
    found = report()
    if arguments.lock:
        lock = json.loads(LOCK.read_text()) if LOCK.exists() else {}
        LOCK.write_text(json.dumps({**lock, nvcc_version(): found}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""``vqfast doctor``: what runs here, what does not, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil

import torch

import vqfast
from vqfast import _backends

# (import name, package, what it is for)
PACKAGES = (
    ("numpy", "numpy", "training, pictures, token files"),
    ("PIL", "Pillow", "pictures"),
    ("safetensors", "safetensors", "models and checkpoints"),
    ("tqdm", "tqdm", "progress bars"),
    ("pytorch_msssim", "pytorch-msssim", "SSIM"),
    ("torchmetrics", "torchmetrics", "SSIM, another way"),
    ("tensorboard", "tensorboard", "TensorBoard logs"),
    ("triton", "triton", "Triton kernels"),
    ("huggingface_hub", "huggingface-hub", "sharing models"),
)


FAMILIES = ("nearest", "gather", "quantize", "ema", "residual")


def add_arguments(parser) -> None:
    pass


def run(args) -> int:
    for title, lines in (
        ("versions", versions()),
        ("backends", backends()),
        ("environment variables", variables()),
        ("optional packages", packages()),
    ):
        print(title)
        print("\n".join(f"  {line}" for line in lines))
    return 0


def versions() -> list[str]:
    cuda = torch.version.cuda or "none"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    compiler = next((found for found in map(shutil.which, ("g++", "c++", "clang++")) if found), "none")
    return [
        f"vqfast    {vqfast.__version__}",
        f"torch     {torch.__version__} (CUDA {cuda})",
        f"Python    {platform.python_version()}",
        f"system    {platform.platform()}",
        f"processor {platform.machine()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        f"GPU       {', '.join(gpus) or 'none that PyTorch sees'}",
        f"compiler  {compiler}",
    ]


def backends() -> list[str]:
    try:
        _backends.check_environment()
    except ValueError as error:  # then no op runs at all
        return [f"nothing runs: {error}"]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"SIMD level of the cpu backend: {_backends.cpu_level() or 'none, see below'}"]
    for device in devices:
        x = torch.empty(1, 1, device=device)
        alike: dict[str, list[str]] = {}  # families with the same answers share their lines
        for family in FAMILIES:
            first, *rest = vqfast.explain(family, x, x).splitlines()
            text = "\n".join([first.partition(": ")[2] + f" with tensors on {device}", *rest]).replace(
                f"{family} has", "it has"
            )
            alike.setdefault(text, []).append(family)
        lines += [line for text, families in alike.items() for line in f"{', '.join(families)}: {text}".splitlines()]
    return lines


def variables() -> list[str]:
    found = sorted(name for name in os.environ if name.startswith("VQFAST_"))
    return [f"{name}={os.environ[name]}" for name in found] or ["no VQFAST_* variable is set"]


def packages() -> list[str]:
    lines = []
    for module, package, purpose in PACKAGES:
        try:
            importlib.import_module(module)
            state = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            state = "there"
        except ImportError as error:
            state = (
                "missing"
                if isinstance(error, ModuleNotFoundError) and error.name == module
                else f"cannot be imported ({error})"
            )
        lines.append(f"{package:<16} {state:<12} {purpose}")
    return lines

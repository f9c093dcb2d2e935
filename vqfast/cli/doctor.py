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
PACKAGES = (("numpy", "numpy", "training, pictures, token files"), ("PIL", "Pillow", "pictures"),
            ("safetensors", "safetensors", "models and checkpoints"), ("tqdm", "tqdm", "progress bars"),
            ("pytorch_msssim", "pytorch-msssim", "SSIM"), ("torchmetrics", "torchmetrics", "SSIM, another way"),
            ("tensorboard", "tensorboard", "TensorBoard logs"), ("triton", "triton", "Triton kernels"),
            ("huggingface_hub", "huggingface-hub", "sharing models"))


def add_arguments(parser) -> None:
    pass


def run(args) -> int:
    for title, lines in (("versions", versions()), ("backends", backends()), ("environment variables", variables()),
                         ("optional packages", packages())):
        print(title)
        print("\n".join(f"  {line}" for line in lines))
    return 0


def versions() -> list[str]:
    cuda = torch.version.cuda or "none"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    compiler = next((found for found in map(shutil.which, ("g++", "c++", "clang++")) if found), "none")
    return [f"vqfast    {vqfast.__version__}", f"torch     {torch.__version__} (CUDA {cuda})", f"Python    {platform.python_version()}",
            f"system    {platform.platform()}", f"processor {platform.machine()}, {os.cpu_count()} logical cores, torch uses "
            f"{torch.get_num_threads()} threads", f"GPU       {', '.join(gpus) or 'none that PyTorch sees'}", f"compiler  {compiler}"]


def backends() -> list[str]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"SIMD level of the cpu backend: {_backends.cpu_level() or 'not built'}"]
    for device in devices:
        x = torch.empty(1, 1, device=device)
        for family in ("nearest", "gather", "quantize", "ema"):
            lines += [f"{line}{' (tensors on ' + device + ')' if number == 0 else ''}"
                      for number, line in enumerate(vqfast.explain(family, x, x).splitlines())]
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
            state = "missing" if isinstance(error, ModuleNotFoundError) and error.name == module else f"cannot be imported ({error})"
        lines.append(f"{package:<16} {state:<12} {purpose}")
    return lines

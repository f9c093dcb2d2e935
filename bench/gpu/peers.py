"""Other libraries' ways to the same result, each where it can be imported. None of them promises the exact code."""

from __future__ import annotations

import importlib.util

import torch


def chunked(x, codebook, score):
    """N x K in pieces of at most 2^28 scores, as a careful user of plain torch would write it."""
    step = max(1, (1 << 28) // len(codebook))
    return torch.cat([score(part).argmin(-1) for part in x.split(step)])


def searches(x: torch.Tensor, codebook: torch.Tensor) -> dict:
    """Name -> call that returns indices [N] of x [N, D] in codebook [K, D]."""
    norms = codebook.float().square().sum(-1)
    wide = codebook.float()

    def eager(tf32: bool):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return chunked(x, codebook, lambda part: torch.addmm(norms, part.float(), wide.T, alpha=-2))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    found = {"torch eager float32": lambda: eager(False)}
    if not x.is_cuda:
        return found
    found["torch eager TF32"] = lambda: eager(True)
    torch._dynamo.reset()  # or the shapes before would make this one's sizes dynamic
    compiled = torch.compile(lambda part: torch.addmm(norms, part.float(), wide.T, alpha=-2).argmin(-1))
    step = max(1, (1 << 28) // len(codebook))
    found["torch.compile"] = lambda: torch.cat([compiled(part) for part in x.split(step)])
    for package in ("flash_kmeans", "flashlib"):
        if importlib.util.find_spec(package):
            found[package] = _triton_assign(package, x, codebook)
    if importlib.util.find_spec("pykeops"):
        found["KeOps"] = lambda: _keops(x, codebook)
    return found


def _triton_assign(package: str, x, codebook):
    module = "flash_kmeans.assign_euclid_triton" if package == "flash_kmeans" else "flashlib.primitives.kmeans.triton.assign"

    def call():
        assign = importlib.import_module(module).euclid_assign_triton
        return assign(x[None], codebook[None], x[None].square().sum(-1))[0].to(torch.int64)

    return call


def _keops(x, codebook):
    from pykeops.torch import LazyTensor

    rows, codes = LazyTensor(x.float()[:, None, :]), LazyTensor(codebook.float()[None])
    return ((rows - codes) ** 2).sum(-1).argmin(dim=1).view(-1)


def quantizers(dim: int, codebook_size: int) -> dict:
    """Name -> constructor of a layer with an EMA codebook."""
    if not importlib.util.find_spec("vector_quantize_pytorch"):
        return {}

    def build():
        from vector_quantize_pytorch import VectorQuantize

        return VectorQuantize(dim=dim, codebook_size=codebook_size, decay=0.99, commitment_weight=0.25)

    return {"vector-quantize-pytorch": build}

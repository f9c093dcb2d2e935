"""The calls whose kernels aot.py compiles: one per path that the host code can take, on tensors of a few kilobytes."""

import torch

from vqfast.kernels import nearest


def rows(dim: int, dtype=torch.float32, n: int = 512, groups: int = 1) -> torch.Tensor:
    return torch.zeros(1, groups, n, dim, dtype=dtype)


def search(dim: int, metric: int = 0, dtype=torch.float32):
    return lambda: nearest.nearest_triton(rows(dim, dtype), torch.zeros(1, 256, dim), metric)


def images(dim: int, dtype=torch.float32) -> torch.Tensor:
    """[B, 1, H W, D] seen through the strides of [B, D, H, W]."""
    return torch.zeros(2, dim, 16, 16, dtype=dtype).flatten(2).transpose(1, 2)[:, None]


ALL = [
    *((f"nearest/D{dim}", search(dim)) for dim in (8, 64, 128, 256, 512)),
    *((f"nearest/{name}/D64", search(64, code)) for code, name in ((1, "cosine"), (2, "dot"))),
    ("nearest/bf16/D64", search(64, dtype=torch.bfloat16)),
    ("nearest/channels_first/D64", lambda: nearest.nearest_triton(images(64), torch.zeros(1, 256, 64), 0)),
]

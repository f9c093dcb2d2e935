"""The calls whose kernels aot.py compiles: one per path that the host code can take, on tensors of a few kilobytes."""

import torch

from vqfast.kernels import _tuning, ema, gather, masked_conv, nearest, quantize, residual


def rows(dim: int, dtype=torch.float32, n: int = 512) -> torch.Tensor:
    return torch.zeros(1, 1, n, dim, dtype=dtype)


def codes(dim: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(1, 256, dim, dtype=dtype)


def search(dim: int, metric: int = 0, dtype=torch.float32):
    return lambda: nearest.nearest_triton(rows(dim, dtype), codes(dim), metric)


def principal(dim: int, metric: int = 0, dtype=torch.float32):
    """The search with the principal-direction screen before it, which takes more scores than there are here."""
    def run():
        before, _tuning.REDUCED_SCORES = _tuning.REDUCED_SCORES, 0
        try:
            nearest.nearest_triton(rows(dim, dtype, 4 * _tuning.PILOT), codes(dim), metric)
        finally:
            _tuning.REDUCED_SCORES = before
    return run


def images(dim: int) -> torch.Tensor:
    """[B, 1, H W, D] seen through the strides of [B, D, H, W]."""
    return torch.zeros(2, dim, 16, 16).flatten(2).transpose(1, 2)[:, None]


def indices(n: int = 512) -> torch.Tensor:
    return torch.zeros(1, 1, n, dtype=torch.int64)


def step(dim: int, dtype=torch.float32, mask=None):
    return lambda: quantize.quantize_triton(rows(dim, dtype), codes(dim), mask, 0, True)


def update(frozen):
    state = codes(64), torch.zeros(1, 256), codes(64)
    return lambda: ema.ema_update_triton_(*state, codes(64), torch.zeros(1, 256, dtype=torch.int64), frozen, 0.99, 1e-5)


def conv(dtype, channels=(128, 256), kernel=3, maps=1):
    """Forward and both gradients, as a layer of a prior."""
    def run():
        cin, cout = channels
        x, weight, bias = torch.zeros(2, cin, 8, 8), torch.zeros(cout, cin, kernel, kernel), torch.zeros(cout)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        y = masked_conv.masked_conv_triton(x, weight, bias, True, 1, maps)
        masked_conv.masked_conv_backward_triton(y, x, weight, True, 1, maps, True, True)
    return run


def gate(dtype, kind, vector):
    def run():
        x = torch.zeros(2, 64, 8, 8, dtype=dtype)
        bias = torch.zeros(2, 64, dtype=dtype) if vector else None
        masked_conv.gate_backward_triton(masked_conv.gate_triton(x, bias, kind), x, bias, kind)
    return run


FLOATS = ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"))
ALL = [
    *((f"nearest/D{dim}", search(dim)) for dim in (8, 64, 128, 256, 512)),
    *((f"nearest/{name}/D64", search(64, code)) for code, name in ((1, "cosine"), (2, "dot"))),
    *((f"nearest/{name}/D64", search(64, dtype=dtype)) for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))),
    *((f"nearest/principal/D{dim}", principal(dim)) for dim in (128, 256, 512)),
    ("nearest/principal/dot/bf16/D128", principal(128, 2, torch.bfloat16)),
    ("nearest/channels_first/D64", lambda: nearest.nearest_triton(images(64), codes(64), 0)),
    *((f"gather/{name}/D64", lambda dtype=dtype: gather.gather_triton(codes(64, dtype), indices()))
      for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))),
    *((f"code_stats/D{dim}", lambda dim=dim: ema.code_stats_triton(rows(dim), indices(), 256)) for dim in (8, 128, 512)),
    ("code_stats/bf16/D64", lambda: ema.code_stats_triton(rows(64, torch.bfloat16), indices(), 256)),
    ("code_stats/int32_keys/D64", lambda: ema.code_stats_triton(rows(64), indices(), 1 << 16)),
    ("ema_update", update(None)),
    ("ema_update/frozen", update(torch.zeros(1, 256, dtype=torch.bool))),
    *((f"quantize/D{dim}", step(dim)) for dim in (64, 512)),
    ("quantize/mask/bf16/D64", step(64, torch.bfloat16, torch.zeros(1, 512, dtype=torch.bool))),
    *((f"masked_conv/{name}", conv(dtype)) for dtype, name in FLOATS),
    *((f"masked_conv/{name}/64x64", conv(dtype, (64, 64))) for dtype, name in FLOATS[:2]),
    *((f"masked_conv/{name}/3x32/7x7", conv(dtype, (3, 32), 7)) for dtype, name in FLOATS[:2]),
    *((f"gate/{name}/{label}", gate(dtype, kind, vector))
      for dtype, name in FLOATS[:2] for label, kind, vector in (("tanh/vector", 0, True), ("glu", 1, False))),
    ("residual/D64", lambda: residual.residual_triton(rows(64), torch.zeros(3, 1, 256, 64), None, 0, True, False)),
]  # fmt: skip

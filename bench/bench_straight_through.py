"""The gradient of a quantizer step into its rows, by layout and dtype, against its formula in torch, which has no eye for rows that do not count,
and a copy of the rows.

pytest bench/bench_straight_through.py --benchmark-only
"""

from __future__ import annotations

import torch
from _common import over, timed
from shapes import ISOTROPIC, Shape

import vqfast
from vqfast import _border

SHAPES = [Shape(ISOTROPIC, 16_384, 1024), Shape(ISOTROPIC, 16_384, 8192)]
LAYOUTS = {
    "rows": (torch.float32, False),
    "channels-first": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, channels-first": (torch.bfloat16, True),
}


def laid_out(rows: torch.Tensor, layout: str) -> torch.Tensor:
    """[N, D] as 16 images or sequences, [16, 1, N / 16, D]."""
    dtype, channels_first = LAYOUTS[layout]
    x = rows.to(dtype).view(16, 1, -1, rows.shape[1])
    return x.transpose(2, 3).contiguous().transpose(2, 3) if channels_first else x


@over(SHAPES, [f"{method}: {layout}" for layout in LAYOUTS for method in ("vqfast", "torch", "copy")])
def bench_straight_through(benchmark, shape, method):
    method, layout = method.split(": ")
    rows, codebook = shape.load()
    x, grad = laid_out(rows, layout), laid_out(rows.flip(0), layout)
    indices = vqfast.nearest(x, codebook).indices
    ours, factor = _border.call("straight_through", "cpu"), torch.tensor(1e-3)

    def plain():
        return torch.addcmul(grad.float(), x.float() - codebook[indices], factor).to(x.dtype)

    with torch.no_grad():
        a, b = ours(grad, x, codebook[None], indices, 1e-3).float(), plain().float()
        torch.testing.assert_close(a, b, rtol=2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-21, atol=1e-6)
        calls = {
            "vqfast": lambda: ours(grad, x, codebook[None], indices, 1e-3),
            "torch": plain,
            "copy": x.clone,
        }
        benchmark.group = f"straight_through {layout}"
        timed(benchmark, calls[method], shape)

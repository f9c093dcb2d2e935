"""Where a row lies: for every kernel that reads rows of x [B, G, N, D] of any strides.

Strides follow from the shape: that of the batch is N G D, in a channels-first picture that of the channels is H W. Triton compiles anew for a number that
becomes a multiple of 16 or ceases to be one, and so would compile for new sizes. Kernels with rows therefore take stride_b and stride_g as they are
(do_not_specialize), stride_d too unless it is 1 (do_not_specialize_on_alignment), and learn from one constant, ALIGN, what vector loads need to know.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def row_alignment(x: Tensor) -> int:
    """ALIGN of rows of x: 16 where every row begins a multiple of 16 elements after x does, else 1; the same for every B, N and picture.

    16, as Triton has it for single arguments: enough for any vector load.
    """
    return 16 if all(stride % 16 == 0 for stride in x.stride()[:3]) else 1


@triton.jit
def _row_pointers(x, stride_b, stride_g, stride_n, b, g, n, ALIGN: tl.constexpr):
    """Pointers to element 0 of rows (b, g, n)."""
    return x + tl.multiple_of(b * stride_b + g * stride_g + n * stride_n, ALIGN)

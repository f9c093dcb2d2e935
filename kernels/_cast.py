"""Conversions that Triton's interpreter gets wrong, spelled out."""

import triton
import triton.language as tl


@triton.jit
def _as(value, TYPE: tl.constexpr):
    """float32 -> TYPE, to nearest even. Triton's interpreter truncates to bfloat16, so that rounding is spelled out."""
    if TYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536, bits)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(TYPE)

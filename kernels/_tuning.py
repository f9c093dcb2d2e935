"""Tile sizes: named constants, chosen by counting registers and shared memory (kernels.lock.json), not by a clock.

`docs/GPU.md` says what each was predicted to do and which still wait for a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from ._triton import cdiv, power_of_two

# A row shorter than this does not fill the 16 products of one tensor-core step, and float16 leaves too many of its codes close.
TENSOR_CORE_DIM = 16
RESOLVE_WAVES = 4

CENTRE = {"BLOCK_D": 32, "num_warps": 8}
PREPARE = {"BLOCK": 16, "BLOCK_D": 64}
ROWS = {"BLOCK": 32, "BLOCK_D": 64}
SETTLE = {"BLOCK_N": 128, "num_warps": 4}


class Screen(NamedTuple):
    half: bool  # tensor cores, or float32 only
    row: int  # elements of a padded row
    kernel: dict


def screen(dim: int, shared_memory: int) -> Screen:
    """How rows of `dim` components are screened on a device with `shared_memory` bytes per program."""
    if dim < TENSOR_CORE_DIM:
        return Screen(False, 16, {})
    whole = power_of_two(dim)
    # 128 rows stay in shared memory beside two stages of 64 codes. 64 and not 128 codes: the two running minima and the product take
    # three registers a score, and each thread holds h and w of its columns; 128 x 128 spills on sm_90.
    if whole <= 256 and (128 + 2 * 64) * whole * 2 <= shared_memory:
        return Screen(True, whole, {"WHOLE_ROW": True, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_D": whole, "num_warps": 8,
                                    "num_stages": 2 if whole > 64 else 3})  # fmt: skip
    return Screen(True, cdiv(dim, 64) * 64, {"WHOLE_ROW": False, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_D": 64, "num_warps": 8,
                                             "num_stages": 3})  # fmt: skip


def resolve(interpreted: bool) -> dict:
    """Tiles of the float32 screen; BLOCK_ALL codes at a time where the formula decides alone."""
    return {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2,
            "BLOCK_ALL": 256 if interpreted else 32}  # fmt: skip

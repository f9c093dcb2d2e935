"""Tile sizes: named constants, chosen by counting registers and shared memory (kernels.lock.json), not by a clock.

`docs/GPU.md` says what each was predicted to do and which still wait for a measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from ._triton import cdiv, interpreted, power_of_two, warps

# A row shorter than this does not fill the 16 products of one tensor-core step, and float16 leaves too many of its codes close.
TENSOR_CORE_DIM = 16
RESOLVE_WAVES = 4

# Triton's interpreter pays per operation, not per element: there the kernels without tile-dependent logic take large tiles.
_INTERPRETED = interpreted()
CENTRE = {"BLOCK_D": 32, "num_warps": 8}
PREPARE = {"BLOCK": 128, "BLOCK_D": 128} if _INTERPRETED else {"BLOCK": 16, "BLOCK_D": 64}
ROWS = {"BLOCK": 128, "BLOCK_D": 128} if _INTERPRETED else {"BLOCK": 32, "BLOCK_D": 64}
SETTLE = {"BLOCK_N": 128, "num_warps": 4}
UPDATE = {"BLOCK": 16, "BLOCK_D": 64}
CODES = 256 if _INTERPRETED else 16
KEYS = {"BLOCK": 1024}  # eight numbers a thread: nothing but a read, a division and a write

# The screen in principal directions: from 128 components on its products take half of the whole rows' time or less. A quarter of the rows may
# stay open before it costs more than it saves. 2^33 scores take some 5 ms on an H200; finding directions, some 0.4 ms.
REDUCED_DIM = 128
REDUCED_SCORES = 1 << 33
PILOT = 1024
PILOT_SHARE = 4
# 64 x 64 coordinates are 32 registers a thread. 16 components a step, as in `resolve`: with 32, operands and accumulator reach 255 registers on sm_80
# (Triton 3.9) and spill there and on sm_90.
REDUCE = {"BLOCK": 64, "STEP": 16, "num_warps": 4}


def orthonormal(dim: int) -> dict:
    """64 x `dim` numbers in the registers of one program: 32 or 64 a thread."""
    return {"BLOCK_D": power_of_two(dim), "num_warps": warps(256 if dim <= 256 else 1024)}


def resolve(row: int) -> dict:
    """Tiles of the float32 screen for padded rows of `row` elements; BLOCK_ALL codes at a time where the formula decides alone.

    A thread of a float32 product holds all of its operands: 16 components at a time, and 16 x 32 tiles, keep sm_80 to sm_100 free of spills and four programs side by side.
    """
    if _INTERPRETED:
        return {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": min(row, 64), "BLOCK_ALL": 256}
    return {"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_D": 16, "BLOCK_ALL": 16, "num_warps": 4, "num_stages": 2}


def step(dim: int) -> dict:
    """Tiles of the kernels that read each row once: gather and quantize; about 1,024 elements a program."""
    block_d = min(power_of_two(dim), 256)
    return {"BLOCK_N": 256 if _INTERPRETED else max(8, 1024 // block_d), "BLOCK_D": block_d}


def sums(dim: int) -> dict:
    """Tiles of code sums: BLOCK rows of one code a program, ROWS at a time; one chunk of components where they fit."""
    block_d = min(power_of_two(dim), 256)
    return {"BLOCK": 512, "ROWS": 512 if _INTERPRETED else min(64, max(4, 2048 // block_d)), "BLOCK_D": block_d}


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



# ---- masked convolutions ---------------------------------------------------------------------------------------------------

PACK = {"BLOCK_C": 32, "BLOCK_P": 64}
GATE = {"BLOCK_C": 16, "BLOCK_P": 64}
# Programs of the weight gradient: two for each multiprocessor of the largest device in sight (B200, 148).
CONV_PROGRAMS = 296


def conv_channels(channels: int, dtype) -> int:
    """Summed channels per step of the loop: 64 two-byte ones fill a 128-byte line; a float32 thread holds all of its operands."""
    return min(64 if dtype.itemsize == 2 else 16, max(16, power_of_two(channels)))


def conv(out_channels: int, in_channels: int, dtype) -> dict:
    """Tile of the forward pass and the gradient to x: BLOCK_M positions x BLOCK_N channels."""
    block_n, block_k = max(16, power_of_two(out_channels)), conv_channels(in_channels, dtype)
    if dtype.itemsize == 4:
        # Two stages: a third costs the registers of its addresses, and four to five programs a multiprocessor hide each other's loads.
        return {"BLOCK_M": 64, "BLOCK_N": min(block_n, 64), "BLOCK_K": block_k, "num_warps": 4, "num_stages": 2}
    block_n = min(block_n, 128)
    return {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8 if block_n == 128 else 4, "num_stages": 3}


def conv_weight_grad(out_channels: int, in_channels: int, dtype) -> dict:
    """Tile of the gradient to the weights: BLOCK_N x BLOCK_M channels, BLOCK_K positions a step."""
    most, positions, stages = (64, 16, 2) if dtype.itemsize == 4 else (128, 64, 3)
    block_n, block_m = (min(most, max(16, power_of_two(n))) for n in (out_channels, in_channels))
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": positions, "num_warps": 8 if block_n * block_m == 128 * 128 else 4,
            "num_stages": stages}  # fmt: skip

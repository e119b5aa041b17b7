"""LayerNorm and LeakyReLU in one pass, for several sets of rows that have weights of their own.

x `(P, R, D)` -> o `(P, R, D)` contiguous, with weight and bias `(P, D)`, or None for 1 and 0. A
slope of 1 is no activation. Rows that are not centred, whose mean is left in, give RMSNorm.
"""

import math
from functools import lru_cache

import torch
import triton

from ..memory_format import dtypes_of
from .launch import Launch
from .norm_kernels import narrow_norm_kernel, norm_kernel
from .tiling import Tiling

# Elements of a tile: 16 for each of 128 threads.
ELEMENTS = 2048
# Bytes that one warp sums at a time, of rows that are no longer, and at most how many of them.
NARROW, ROWS = 4096, 128
# Programs over narrow rows of all sets, at most: 20 for each multiprocessor of the largest GPU.
PROGRAMS = 2640


def in_units(
    shape: tuple[int, ...], dtype: torch.dtype, *strides: tuple[int, ...]
) -> tuple[int, list[int]]:
    """Elements that divide the strides `(P, R)`, at most 16 bytes of them, and those strides."""
    # An axis of length 1 is never stepped along.
    steps = [
        s if n > 1 else 0 for stride in strides for s, n in zip(stride[:2], shape, strict=False)
    ]
    unit = math.gcd(16 // dtype.itemsize, *steps)
    return unit, [step // unit for step in steps]


@lru_cache(maxsize=1024)
def plan_norm(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
    slope: float,
    centred: bool = True,
) -> Launch:
    """others: dtypes of weight, bias and o, which the kernel is compiled for as well."""
    P, R, D = shape
    # Tiles follow from D alone, so that a row's result does not depend on how many there are.
    width, acc = triton.next_power_of_2(D), Tiling.acc(dtype)
    longest, steps = in_units(shape, dtype, stride)
    # Nor may units, which a single row has none of; masks are told for no more than these.
    unit = math.gcd(longest, D)
    steps = [longest // unit * step for step in steps]
    constants = {"UNIT": unit, "CENTRED": centred, "ACC": acc}
    numbers = (*steps, R, eps, slope)
    elements = NARROW // (acc.primitive_bitwidth // 8)
    if width > elements:
        block = max(1, ELEMENTS // width)
        return Launch(
            norm_kernel,
            (triton.cdiv(R, block), P),
            numbers,
            {"D": D, "BLOCK": block, "PIECE": width, **constants},
            {"num_warps": 4, "num_stages": 1},
        )
    block = min(ROWS, elements // width)
    # As measured: rows of 320 are faster in pieces of 256, of 640 in pieces of 128.
    piece = min(width, 128 * block)
    # As many as a multiprocessor has registers for at one time: fewer where little is masked.
    masked, short = elements - D, dtype.itemsize == 2
    if masked < elements // 8:
        programs = PROGRAMS * (15 if short else 12) // 20
    else:
        programs = PROGRAMS * (20 if short and masked > elements // 4 else 16) // 20
    return Launch(
        narrow_norm_kernel,
        (min(triton.cdiv(R, block), max(1, programs // P)), P),
        numbers,
        {"D": D, "PIECES": width // piece, "BLOCK": block, "PIECE": piece, **constants},
        {"num_warps": 1, "num_stages": 1},
    )


def launch_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float
) -> torch.Tensor:
    """The last axis of x is contiguous, weight and bias are."""
    o = x.new_empty(x.shape)
    others = dtypes_of(weight, bias, o)
    plan = plan_norm(tuple(x.shape), x.stride(), x.dtype, others, eps, slope)
    plan(x, weight, bias, o)
    return o


@lru_cache(maxsize=1024)
def plan_layer_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
    centred: bool = True,
) -> Launch:
    """For contiguous x `(..., D)`, without an activation."""
    D = shape[-1]
    return plan_norm((1, math.prod(shape[:-1]), D), (0, D, 1), dtype, others, eps, 1.0, centred)

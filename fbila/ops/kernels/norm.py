"""LayerNorm and LeakyReLU in one pass, for several sets of rows that have weights of their own.

x `(P, R, D)` -> o `(P, R, D)` contiguous, with weight and bias `(P, D)`, or None for 1 and 0. A
slope of 1 is no activation. Rows that are not centred, whose mean is left in, give RMSNorm.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..memory_format import dtypes_of
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile: 16 for each of 128 threads.
ELEMENTS = 2048


@kernel
def norm_kernel(
    x, weight, bias, o,
    stride_xp: "i64", stride_xr: "i64", rows: "i64", eps: "fp64", slope: "fp64",
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    CENTRED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, WIDTH)
    inside = o_d < D
    mask = (o_r < rows)[:, None] & inside[None, :]
    # Strides are in units, which proves the alignment that 16-byte loads need.
    p_x = x + i_p * (stride_xp * UNIT) + o_r[:, None] * (stride_xr * UNIT) + o_d[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(ACC)
    if CENTRED:
        b_x -= (tl.sum(b_x, 1) / D)[:, None]
        b_x = tl.where(inside[None, :], b_x, 0.0)
    variance = tl.sum(b_x * b_x, 1) / D
    b_x *= (1.0 / tl.sqrt(variance + tl.full((), eps, ACC)))[:, None]
    if weight is not None:
        b_x *= tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)[None, :]
    if bias is not None:
        b_x += tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)[None, :]
    b_x = tl.where(b_x < 0, b_x * tl.full((), slope, ACC), b_x)
    p_o = o + (i_p * rows + o_r[:, None]) * D + o_d[None, :]
    tl.store(p_o, b_x.to(o.dtype.element_ty), mask=mask)


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
    width = triton.next_power_of_2(D)
    block = max(1, ELEMENTS // width)
    unit, steps = in_units(shape, dtype, stride)
    constants = {
        "D": D, "WIDTH": width, "BLOCK": block, "UNIT": unit, "CENTRED": centred,
        "ACC": Tiling.acc(dtype),
    }  # fmt: skip
    return Launch(
        norm_kernel,
        (triton.cdiv(R, block), P),
        (*steps, R, eps, slope),
        constants,
        {"num_warps": 4, "num_stages": 1},
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

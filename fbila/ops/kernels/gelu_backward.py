"""GELU and its gradient in one pass: x and the gradient df of f = GELU(x) -> f and dx.

dx may take the place of df. Both are computed in float32 and rounded once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import warps
from .depthwise_conv import gelu_and_slope
from .launch import Launch, kernel
from .silu_gate import place
from .tiling import Tiling

# Elements of a program.
BLOCK = 4096


@kernel
def gelu_backward_kernel(
    x, df, dx, f, length: "i64", UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    o, mask = place(length, UNIT, BLOCK)
    b_f, slope = gelu_and_slope(tl.load(x + o, mask=mask, other=0.0).to(ACC))
    b_dx = tl.load(df + o, mask=mask, other=0.0).to(ACC) * slope
    tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=mask)
    tl.store(f + o, b_f.to(f.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_gelu_backward(length: int, dtype: torch.dtype) -> Launch:
    unit = 16 // dtype.itemsize
    unit = unit if length % unit == 0 else 1
    block = min(BLOCK, triton.next_power_of_2(length))
    return Launch(
        gelu_backward_kernel,
        (triton.cdiv(length, block), 1),
        (length // unit,),
        {"UNIT": unit, "BLOCK": block, "ACC": Tiling.acc(dtype)},
        {"num_warps": warps(block), "num_stages": 1},
    )

"""y = x SiLU(g), element by element, and its gradients dx = dy SiLU(g), dg = dy x SiLU'(g).

All in float32, rounded once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import inside, warps
from .gated_conv import silu, silu_and_slope
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a program.
BLOCK = 4096


@triton.jit
def place(length, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return o, inside(o, length, UNIT)


@kernel
def silu_gate_kernel(
    x, g, y, length: "i64", UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    o, mask = place(length, UNIT, BLOCK)
    b_x = tl.load(x + o, mask=mask, other=0.0).to(ACC)
    b_y = b_x * silu(tl.load(g + o, mask=mask, other=0.0).to(ACC))
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=mask)


@kernel
def silu_gate_backward_kernel(
    x, g, dy, dx, dg, length: "i64", UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    o, mask = place(length, UNIT, BLOCK)
    b_x = tl.load(x + o, mask=mask, other=0.0).to(ACC)
    b_dy = tl.load(dy + o, mask=mask, other=0.0).to(ACC)
    s, slope = silu_and_slope(tl.load(g + o, mask=mask, other=0.0).to(ACC))
    tl.store(dx + o, (b_dy * s).to(dx.dtype.element_ty), mask=mask)
    tl.store(dg + o, (b_dy * b_x * slope).to(dg.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_silu_gate(length: int, dtype: torch.dtype, backward: bool) -> Launch:
    unit = 16 // dtype.itemsize
    unit = unit if length % unit == 0 else 1
    block = min(BLOCK, triton.next_power_of_2(length))
    return Launch(
        silu_gate_backward_kernel if backward else silu_gate_kernel,
        (triton.cdiv(length, block), 1),
        (length // unit,),
        {"UNIT": unit, "BLOCK": block, "ACC": Tiling.acc(dtype)},
        {"num_warps": warps(block), "num_stages": 1},
    )

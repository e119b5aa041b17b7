"""GEGLU of x `(R, 2 D)`, whose halves are a and g: y = a g (1 + erf(g / sqrt(2))) / 2.

    da = dy g Phi(g),    dg = dy a (Phi(g) + g phi(g)),    Phi(g) = (1 + erf(g / sqrt(2))) / 2

phi is the derivative of Phi. Both are computed in float32 and rounded once.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import inside, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile, and its columns: they divide the widths that models have.
ELEMENTS, COLUMNS = 4096, 256


@kernel
def geglu_kernel(
    x, y, rows: "i64", width: "i64", blocks: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_r < rows)[:, None] & inside(o_d, width, UNIT)[None, :]
    D = width * UNIT
    p_x = x + o_r[:, None] * (2 * D) + o_d[None, :]
    b_a = tl.load(p_x, mask=mask, other=0.0).to(ACC)
    b_g = tl.load(p_x + D, mask=mask, other=0.0).to(ACC)
    b_y = b_a * (0.5 * b_g * (1.0 + tl.erf(b_g * 0.7071067811865476)))
    tl.store(y + o_r[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@kernel
def geglu_backward_kernel(
    x, dy, dx, rows: "i64", width: "i64", blocks: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_r < rows)[:, None] & inside(o_d, width, UNIT)[None, :]
    D = width * UNIT
    o_x = o_r[:, None] * (2 * D) + o_d[None, :]
    b_a = tl.load(x + o_x, mask=mask, other=0.0).to(ACC)
    b_g = tl.load(x + D + o_x, mask=mask, other=0.0).to(ACC)
    b_dy = tl.load(dy + o_r[:, None] * D + o_d[None, :], mask=mask, other=0.0).to(ACC)
    b_below = 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))
    b_density = 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    b_da = b_dy * (b_g * b_below)
    b_dg = b_dy * b_a * (b_below + b_g * b_density)
    tl.store(dx + o_x, b_da.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + D + o_x, b_dg.to(dx.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_geglu(rows: int, D: int, dtype: torch.dtype, backward: bool = False) -> Launch:
    unit = math.gcd(16 // dtype.itemsize, D)
    block = min(COLUMNS, triton.next_power_of_2(D))
    tall = min(ELEMENTS // block, triton.next_power_of_2(rows))
    blocks = triton.cdiv(D, block)
    return Launch(
        geglu_backward_kernel if backward else geglu_kernel,
        (triton.cdiv(rows, tall) * blocks, 1),
        (rows, D // unit, blocks),
        {"UNIT": unit, "ROWS": tall, "BLOCK": block, "ACC": Tiling.acc(dtype)},
        {"num_warps": warps(tall * block), "num_stages": 1},
    )


def launch_geglu(x: torch.Tensor, y: torch.Tensor) -> None:
    """Fill y `(..., D)`; both are contiguous, and not empty."""
    D = y.shape[-1]
    plan_geglu(y.numel() // D, D, x.dtype)(x, y)


def launch_geglu_backward(x: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor) -> None:
    """Fill dx `(..., 2 D)`; all are contiguous and of one dtype, and not empty."""
    D = dy.shape[-1]
    plan_geglu(dy.numel() // D, D, x.dtype, backward=True)(x, dy, dx)

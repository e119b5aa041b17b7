"""A gradient, or the sum of two, written where it belongs among those of the other parts.

x, y and out `(R, C)`, each with rows of its own stride: out = x or x + y, in float32, or float64 of
float64, rounded once.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import inside, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile, and its most columns: 256 bytes of a 16-bit type.
ELEMENTS, COLUMNS = 4096, 128


@kernel
def place_kernel(
    out, x, y, stride_out: "i64", stride_x: "i64", stride_y: "i64", rows: "i64", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Blocks of columns are fastest: programs that run together share the lines they meet in.
    columns = tl.cdiv(width * UNIT, BLOCK)
    i_c, i_r = tl.program_id(0) % columns, tl.program_id(0) // columns
    o_r = (i_r.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_c = (i_c.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (o_r < rows) & inside(o_c, width, UNIT)
    value = tl.load(x + o_r * (stride_x * UNIT) + o_c, mask=mask, other=0.0)
    if y is not None:
        b_y = tl.load(y + o_r * (stride_y * UNIT) + o_c, mask=mask, other=0.0)
        value = value.to(ACC) + b_y.to(ACC)
    out += o_r * (stride_out * UNIT) + o_c
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_place(
    rows: int, columns: int, strides: tuple[int, int, int], dtype: torch.dtype
) -> Launch:
    """strides: From one row of out, x and y to the next; of a y that is not there 0."""
    unit = math.gcd(16 // dtype.itemsize, columns, *strides)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    tall = min(ELEMENTS // block, triton.next_power_of_2(rows))
    return Launch(
        place_kernel,
        (triton.cdiv(columns, block) * triton.cdiv(rows, tall), 1),
        (*(stride // unit for stride in strides), rows, columns // unit),
        {"UNIT": unit, "ROWS": tall, "BLOCK": block, "ACC": Tiling.acc(dtype)},
        {"num_warps": warps(tall * block), "num_stages": 1},
    )

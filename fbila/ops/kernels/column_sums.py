"""Sums over the rows of a matrix, such as the gradient of a bias.

x `(R, C)`, contiguous along C -> the sums of each program, `(parts, C)`, which `add_up.py` adds up
in one order every time. Where there is one part, it may be of any dtype.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .add_up import plan_add_up
from .channels import inside
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile: 32 for each of 128 threads, and as many on their way.
ELEMENTS = 4096
# The most columns of a tile; they divide the widths that models have.
COLUMNS = 128
# Four for every multiprocessor of the largest GPU.
PROGRAMS = 528


@kernel
def column_sums_kernel(
    x, sums, stride: "i64", rows: "i64", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C = tl.cast(width, tl.int64) * UNIT
    # Blocks of columns are fastest: programs that run together share the lines they meet in.
    blocks = tl.cdiv(C, BLOCK).to(tl.int32)
    i_p, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    o_c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_c = inside(o_c, width, UNIT)[None, :]
    o_r = i_p.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    step = parts * ROWS
    p_x = x + o_r * (stride * UNIT) + o_c[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    # The next rows are on their way while these are added.
    ahead = tl.load(p_x, mask=(o_r < rows) & m_c, other=0.0)
    for _ in range(i_p.to(tl.int64) * ROWS, rows, step):
        b_x = ahead.to(ACC)
        o_r += step
        p_x += step * (stride * UNIT)
        ahead = tl.load(p_x, mask=(o_r < rows) & m_c, other=0.0)
        total += b_x
    p_s = sums + i_p.to(tl.int64) * C + o_c
    tl.store(p_s, tl.sum(total, 0).to(sums.dtype.element_ty), mask=inside(o_c, width, UNIT))


@lru_cache(maxsize=1024)
def plan_column_sums(
    rows: int, columns: int, stride: int, dtype: torch.dtype
) -> tuple[Launch, Launch, int]:
    """The launches of both kernels, and how many rows the sums between them have.

    stride: From one row of x to the next.
    """
    unit = math.gcd(16 // dtype.itemsize, columns, stride)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    tall = ELEMENTS // block
    blocks = triton.cdiv(columns, block)
    parts = max(1, min(triton.cdiv(rows, tall), PROGRAMS // blocks))
    acc = Tiling.acc(dtype)
    launch = Launch(
        column_sums_kernel,
        (blocks * parts, 1),
        (stride // unit, rows, columns // unit),
        {"UNIT": unit, "ROWS": tall, "BLOCK": block, "ACC": acc},
        {"num_warps": 4, "num_stages": 1},
    )
    return launch, plan_add_up(columns, columns, parts, 0, acc, (None, dtype)), parts

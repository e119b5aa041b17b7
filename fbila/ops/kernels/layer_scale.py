"""z = x + s y, of a number s for each channel, and its gradients dy = s dz, ds = sum dz y.

x, y, z, dz, dy `(R, C)`, contiguous, s `(C,)` -> z, or dy and the sums of each program,
`(parts, C)`, which `add_up.py` adds up in one order every time. All of it in float32, or float64
where z is, rounded once. In the backward pass either result may be left out, and what it reads.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .add_up import plan_add_up
from .channels import inside
from .column_sums import COLUMNS, PROGRAMS
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile: 16 of each tensor for each of 128 threads, and as many on their way.
ELEMENTS = 2048


@kernel
def add_scaled_kernel(
    x, scale, y, z, rows: "i64", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C = tl.cast(width, tl.int64) * UNIT
    blocks = tl.cdiv(C, BLOCK).to(tl.int32)
    i_r, i_c = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_r = i_r.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = i_c.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_c = inside(o_c, width, UNIT)
    o, mask = o_r * C + o_c[None, :], (o_r < rows) & m_c[None, :]
    b_x = tl.load(x + o, mask=mask, other=0.0).to(ACC)
    b_y = tl.load(y + o, mask=mask, other=0.0).to(ACC)
    b_s = tl.load(scale + o_c, mask=m_c, other=0.0).to(ACC)
    tl.store(z + o, (b_x + b_s[None, :] * b_y).to(z.dtype.element_ty), mask=mask)


@kernel
def add_scaled_backward_kernel(
    dz, scale, y, dy, sums, rows: "i64", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C = tl.cast(width, tl.int64) * UNIT
    # Blocks of columns are fastest: programs that run together share the lines they meet in.
    blocks = tl.cdiv(C, BLOCK).to(tl.int32)
    i_p, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    o_r = i_p.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_c = inside(o_c, width, UNIT)
    step = parts * ROWS
    o, mask = o_r * C + o_c[None, :], (o_r < rows) & m_c[None, :]
    # The next rows are on their way while these are multiplied.
    next_dz = tl.load(dz + o, mask=mask, other=0.0)
    if dy is not None:
        b_s = tl.load(scale + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if sums is not None:
        next_y = tl.load(y + o, mask=mask, other=0.0)
        total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    for _ in range(i_p.to(tl.int64) * ROWS, rows, step):
        b_dz, p_dy, m_dy = next_dz.to(ACC), o, mask
        if sums is not None:
            b_y = next_y.to(ACC)
        o_r += step
        o += step * C
        mask = (o_r < rows) & m_c[None, :]
        next_dz = tl.load(dz + o, mask=mask, other=0.0)
        if sums is not None:
            next_y = tl.load(y + o, mask=mask, other=0.0)
            total += b_dz * b_y
        if dy is not None:
            tl.store(dy + p_dy, (b_dz * b_s).to(dy.dtype.element_ty), mask=m_dy)
    if sums is not None:
        tl.store(sums + i_p.to(tl.int64) * C + o_c, tl.sum(total, 0), mask=m_c)


def numbers_of(
    rows: int, columns: int, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[tuple[int, int], dict, int, int]:
    """The numbers and constants of a launch, how many blocks of columns there are, and of rows.

    dtypes: Of its tensors, z or dz first; None for those that are missing.
    """
    # What is aligned in the narrowest is in the others.
    narrowest = min(dtype.itemsize for dtype in dtypes if dtype is not None)
    unit = math.gcd(16 // narrowest, columns)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    tall = ELEMENTS // block
    constants = {"UNIT": unit, "ROWS": tall, "BLOCK": block, "ACC": Tiling.acc(dtypes[0])}
    blocks = triton.cdiv(columns, block)
    return (rows, columns // unit), constants, blocks, triton.cdiv(rows, tall)


@lru_cache(maxsize=1024)
def plan_add_scaled(rows: int, columns: int, dtypes: tuple[torch.dtype, ...]) -> Launch:
    """dtypes: Of z, x, scale and y."""
    numbers, constants, blocks, tiles = numbers_of(rows, columns, dtypes)
    options = {"num_warps": 4, "num_stages": 1}
    return Launch(add_scaled_kernel, (blocks * tiles, 1), numbers, constants, options)


@lru_cache(maxsize=1024)
def plan_add_scaled_backward(
    rows: int,
    columns: int,
    dtypes: tuple[torch.dtype | None, ...],
    dscale: torch.dtype,
) -> tuple[Launch, Launch, int]:
    """The launches of both kernels, and how many rows the sums between them have.

    dtypes: Of dz, scale, y and dy; None for those that are missing.
    """
    numbers, constants, blocks, tiles = numbers_of(rows, columns, dtypes)
    parts = max(1, min(tiles, PROGRAMS // blocks))
    launch = Launch(
        add_scaled_backward_kernel,
        (blocks * parts, 1),
        numbers,
        constants,
        {"num_warps": 4, "num_stages": 1},
    )
    return launch, plan_add_up(columns, columns, parts, 0, constants["ACC"], (None, dscale)), parts

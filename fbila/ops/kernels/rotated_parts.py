"""Pairs of neighbouring channels rotated, of queries and keys that lie in one projection.

whole `(B, N, 4, C)` of queries, keys, values and gates, cos and sin `(N, d / 2)`, which the C / d
heads share -> q and k `(B, N, C)`, all of them contiguous. Backward, gradients of the four parts
-> that of the whole: those of q and k turned back, those of values and gates as they are. In
float32, or float64 where q is, rounded once.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import inside, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Of a tile: 128 bytes of a 16-bit type, and 16 elements of each part for each of 128 threads.
COLUMNS, TOKENS = 64, 32


@triton.jit
def places(
    tokens, width, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """A program's (ROWS, BLOCK): C, where they are in a part and in the whole, and which there are.

    Then where (ROWS, BLOCK / 2) are in the tables, and which of their rows there are.
    """
    C = tl.cast(width, tl.int64) * UNIT
    # Blocks of columns are fastest: programs that run together share the lines they meet in.
    columns, rows = tl.cdiv(C, BLOCK).to(tl.int32), tl.cdiv(tokens, ROWS)
    i_c, i_r = tl.program_id(0) % columns, tl.program_id(0) // columns
    o_n = (i_r % rows) * ROWS + tl.arange(0, ROWS)
    o_r = ((i_r // rows).to(tl.int64) * tokens + o_n)[:, None]
    o_c = i_c.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_p = (i_c * (BLOCK // 2) + tl.arange(0, BLOCK // 2)) % HALF
    there = (o_n < tokens)[:, None]
    mask = there & inside(o_c, width, UNIT)[None, :]
    o_t = o_n.to(tl.int64)[:, None] * HALF + o_p[None, :]
    return C, o_r * C + o_c[None, :], o_r * (4 * C) + o_c[None, :], mask, o_t, there


@triton.jit
def turn(x, cos, sin):
    """x (ROWS, BLOCK) by cos and sin (ROWS, BLOCK / 2)."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    a, b = tl.split(tl.reshape(x.to(cos.dtype), (ROWS, PAIRS, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * PAIRS))


@kernel
def rotated_parts_kernel(
    whole, cos, sin, q, k, tokens: "i32", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    C, o, o_w, mask, o_t, there = places(tokens, width, UNIT, ROWS, BLOCK, HALF)
    b_q = tl.load(whole + o_w, mask=mask, other=0.0)
    b_k = tl.load(whole + o_w + C, mask=mask, other=0.0)
    b_cos = tl.load(cos + o_t, mask=there, other=0.0).to(ACC)
    b_sin = tl.load(sin + o_t, mask=there, other=0.0).to(ACC)
    tl.store(q + o, turn(b_q, b_cos, b_sin).to(q.dtype.element_ty), mask=mask)
    tl.store(k + o, turn(b_k, b_cos, b_sin).to(k.dtype.element_ty), mask=mask)


@kernel
def rotated_parts_backward_kernel(
    dwhole, cos, sin, dq, dk, dv, dgate, tokens: "i32", width: "i32",
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    C, o, o_w, mask, o_t, there = places(tokens, width, UNIT, ROWS, BLOCK, HALF)
    b_dq = tl.load(dq + o, mask=mask, other=0.0)
    b_dk = tl.load(dk + o, mask=mask, other=0.0)
    b_dv = tl.load(dv + o, mask=mask, other=0.0)
    b_dgate = tl.load(dgate + o, mask=mask, other=0.0)
    b_cos = tl.load(cos + o_t, mask=there, other=0.0).to(ACC)
    b_sin = -tl.load(sin + o_t, mask=there, other=0.0).to(ACC)
    dwhole += o_w
    tl.store(dwhole, turn(b_dq, b_cos, b_sin).to(dwhole.dtype.element_ty), mask=mask)
    tl.store(dwhole + C, turn(b_dk, b_cos, b_sin).to(dwhole.dtype.element_ty), mask=mask)
    tl.store(dwhole + 2 * C, b_dv, mask=mask)
    tl.store(dwhole + 3 * C, b_dgate, mask=mask)


@lru_cache(maxsize=1024)
def plan_rotated_parts(
    batch: int, tokens: int, heads: int, d: int, dtype: torch.dtype, backward: bool
) -> Launch:
    """dtype: Of all but the tables, which are float32, or float64 for float64."""
    C = heads * d
    unit = math.gcd(16 // dtype.itemsize, C)
    block = min(COLUMNS, triton.next_power_of_2(C))
    rows = min(TOKENS, triton.next_power_of_2(tokens))
    return Launch(
        rotated_parts_backward_kernel if backward else rotated_parts_kernel,
        (batch * triton.cdiv(tokens, rows) * triton.cdiv(C, block), 1),
        (tokens, C // unit),
        {"UNIT": unit, "ROWS": rows, "BLOCK": block, "HALF": d // 2, "ACC": Tiling.acc(dtype)},
        {"num_warps": warps(rows * block), "num_stages": 1},
    )

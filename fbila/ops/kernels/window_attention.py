"""Softmax attention within windows of a grid, which is read and written in place.

    o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + bias_ij + mask_ij) v_j        i, j of one window

qkv `(B, H, W, 3 C)`, table `((2 WH - 1) (2 WW - 1), heads)`, fill `(3 C,)` or None -> y
`(B, H, W, C)`. Bias and mask are those of `windows.py`. What lies beyond the grid has the queries,
keys and values of fill, or zeros, and no result. A program has one head of the windows at one
place in several pictures: their tokens and their bias it finds once. The logits stay in registers.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .windows import bias_of, load_heads, tokens_of, weights_of

# Programs for every multiprocessor, of which an H200 has as many.
PROGRAMS, MULTIPROCESSORS = 6, 132


@kernel
def window_attention_kernel(
    qkv, table, fill, y,
    pictures: "i32", rows: "i32", columns: "i32", down: "i32", across: "i32",
    shift_r: "i32", shift_c: "i32", turn_r: "i32", turn_c: "i32", heads: "i32", scale: "fp64",
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, SHIFTED: tl.constexpr, FILLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_h, i_w = tl.program_id(0) % heads, tl.program_id(0) // heads
    C = tl.cast(heads, tl.int64) * D
    factor = tl.cast(scale, tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_d < D)[None, :]
    token, there = tokens_of(i_w, rows, columns, across, turn_r, turn_c, WH, WW, BLOCK)
    place = i_w, down, across, shift_r, shift_c
    bias = bias_of(table + i_h, heads, *place, WH, WW, BLOCK, SHIFTED)
    f_q, f_k, f_v = fill, fill, fill
    if FILLED:
        f_q += i_h * D + o_d[None, :]
        f_k, f_v = f_q + C, f_q + 2 * C
    size = tl.cast(rows, tl.int64) * columns * C
    p_q = qkv + i_h * D + token[:, None] * (3 * C) + o_d[None, :]
    p_y = y + i_h * D + token[:, None] * C + o_d[None, :]
    for i in range(tl.program_id(1), pictures, tl.num_programs(1)):
        i_b = tl.cast(i, tl.int64)
        p_b = p_q + i_b * (3 * size)
        q = load_heads(p_b, there, f_q, inside, FILLED)
        k = load_heads(p_b + C, there, f_k, inside, FILLED)
        v = load_heads(p_b + 2 * C, there, f_v, inside, FILLED)
        p, total = weights_of(q, k, bias, factor, PRECISION)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        tl.store(p_y + i_b * size, o.to(y.dtype.element_ty), mask=there[:, None] & inside)


def geometry(
    shape: tuple[int, ...],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    filled: bool,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Windows of a picture, and the numbers and constants of both passes."""
    B, H, W, C = shape
    D = C // heads
    down, across = triton.cdiv(H, window[0]), triton.cdiv(W, window[1])
    # A grid may be smaller than the shift of its windows.
    turn = shift[0] % H, shift[1] % W
    numbers = (B, H, W, down, across, *shift, *turn, heads, D**-0.5)
    beyond = H % window[0] > 0 or W % window[1] > 0
    return (
        down * across,
        numbers,
        {
            "D": D,
            "WH": window[0],
            "WW": window[1],
            # A tile of a product has 16 rows and columns at least.
            "BLOCK": max(16, triton.next_power_of_2(window[0] * window[1])),
            "BLOCK_D": max(16, triton.next_power_of_2(D)),
            "SHIFTED": any(shift),
            "FILLED": filled and beyond,
            "PRECISION": "ieee",
        },
    )


@lru_cache(maxsize=1024)
def plan_window_attention(
    shape: tuple[int, ...],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    dtypes: tuple[torch.dtype | None, ...],
) -> Launch:
    """shape: of y. dtypes: of qkv, table, fill and y."""
    windows, numbers, constants = geometry(shape, heads, window, shift, dtypes[2] is not None)
    parts = min(shape[0], triton.cdiv(PROGRAMS * MULTIPROCESSORS, windows * heads))
    # The next window is on its way while this one is multiplied.
    options = {"num_warps": warps_for(dtypes[0]), "num_stages": 2}
    return Launch(window_attention_kernel, (windows * heads, parts), numbers, constants, options)


def warps_for(dtype: torch.dtype | None) -> int:
    """Without tensor cores, whose tiles four warps share best, a tile takes more registers."""
    return 8 if dtype == torch.float32 else 4

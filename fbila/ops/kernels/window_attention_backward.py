"""The gradients of softmax attention within windows, whose weights are computed again.

    dP = dO V^T        dS = P (dP - sum_j P_j dP_j)        dV = P^T dO
    dQ = d^(-1/2) dS K        dK = d^(-1/2) dS^T Q        dbias = sum dS over windows

dy `(B, H, W, C)`, and what `window_attention.py` takes -> dqkv `(B, H, W, 3 C)`, and the sums of
each program: of dS `(groups, heads, T, T)`, and of dK and dV beyond the grid `(groups, 2 C)`.
The second kernel adds dS up for each number of the table, in one order every time.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .window_attention import MULTIPROCESSORS, geometry, warps_for
from .windows import bias_of, load_heads, tokens_of, weights_of

# Programs that a multiprocessor has room for, and how many windows' time each takes beside them:
# for its bias, and its sums.
PROGRAMS, BESIDE = 2, 2


@kernel
def grad_window_attention_kernel(
    qkv, table, fill, dy, dqkv, sums, beyond,
    pictures: "i32", rows: "i32", columns: "i32", down: "i32", across: "i32",
    shift_r: "i32", shift_c: "i32", turn_r: "i32", turn_c: "i32", heads: "i32", scale: "fp64",
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, SHIFTED: tl.constexpr, FILLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    i_h, i_w = tl.program_id(0) % heads, tl.program_id(0) // heads
    C = tl.cast(heads, tl.int64) * D
    factor = tl.cast(scale, tl.float32)
    o_t, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (o_d < D)[None, :]
    token, there = tokens_of(i_w, rows, columns, across, turn_r, turn_c, WH, WW, BLOCK)
    place = i_w, down, across, shift_r, shift_c
    bias = bias_of(table + i_h, heads, *place, WH, WW, BLOCK, SHIFTED)
    f_q, f_k, f_v = fill, fill, fill
    if FILLED:
        f_q += i_h * D + o_d[None, :]
        f_k, f_v = f_q + C, f_q + 2 * C
    size = tl.cast(rows, tl.int64) * columns * C
    mask, outside = there[:, None] & inside, ((o_t < T) & (there == 0))[:, None]
    o_q = i_h * D + token[:, None] * (3 * C) + o_d[None, :]
    p_y = dy + i_h * D + token[:, None] * C + o_d[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    outer_k, outer_v = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for i in range(tl.program_id(1), pictures, tl.num_programs(1)):
        i_b = tl.cast(i, tl.int64)
        p_q, p_d = qkv + i_b * (3 * size) + o_q, dqkv + i_b * (3 * size) + o_q
        q = load_heads(p_q, there, f_q, inside, FILLED)
        k = load_heads(p_q + C, there, f_k, inside, FILLED)
        v = load_heads(p_q + 2 * C, there, f_v, inside, FILLED)
        # What is beyond the grid has no result, and none is asked for.
        do = load_heads(p_y + i_b * size, there, fill, inside, False).to(v.dtype)
        p, whole = weights_of(q, k, bias, factor, PRECISION)
        p /= whole[:, None]
        # One after another: together they take more registers than there are.
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        tl.store(p_d + 2 * C, dv.to(dqkv.dtype.element_ty), mask=mask)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        total += ds
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * factor
        tl.store(p_d, dq.to(dqkv.dtype.element_ty), mask=mask)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * factor
        tl.store(p_d + C, dk.to(dqkv.dtype.element_ty), mask=mask)
        if FILLED:
            outer_k += tl.sum(tl.where(outside, dk, 0.0), 0)
            outer_v += tl.sum(tl.where(outside, dv, 0.0), 0)
    i_s = tl.cast(tl.program_id(1), tl.int64) * (down * across) + i_w
    o_s = (i_s * heads + i_h) * (T * T) + o_t[:, None] * T + o_t[None, :]
    tl.store(sums + o_s, total, mask=(o_t < T)[:, None] & (o_t < T)[None, :])
    if FILLED:
        p_b = beyond + i_s * (2 * C) + i_h * D + o_d
        tl.store(p_b, outer_k, mask=o_d < D)
        tl.store(p_b + C, outer_v, mask=o_d < D)


@kernel
def grad_table_kernel(
    sums, dtable, groups: "i32", heads: "i32",
    WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr, AT_A_TIME: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    # How far the query is below and to the right of the key.
    below, right = i_n // (2 * WW - 1) - (WH - 1), i_n % (2 * WW - 1) - (WW - 1)
    o_t = tl.arange(0, BLOCK)
    k_r, k_c = o_t // WW - below, o_t % WW - right
    pair = (o_t < T) & (k_r >= 0) & (k_r < WH) & (k_c >= 0) & (k_c < WW)
    o_p = o_t * T + k_r * WW + k_c
    total = tl.zeros((AT_A_TIME, BLOCK), tl.float32)
    for first in range(0, groups, AT_A_TIME):
        o_g = first + tl.arange(0, AT_A_TIME)
        o_s = (o_g.to(tl.int64) * heads + i_h) * (T * T)
        mask = (o_g < groups)[:, None] & pair[None, :]
        total += tl.load(sums + o_s[:, None] + o_p[None, :], mask=mask, other=0.0)
    whole = tl.sum(tl.sum(total, 0), 0)
    tl.store(dtable + i_n * heads + i_h, whole.to(dtable.dtype.element_ty))


@lru_cache(maxsize=1024)
def plan_grad_window_attention(
    shape: tuple[int, ...],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Launch, Launch, int]:
    """The launches of both kernels, and the groups of sums between them.

    shape: of dy. dtypes: of qkv, table, fill, dy and dtable, which is `(numbers, heads)`.
    """
    windows, numbers, constants = geometry(shape, heads, window, shift, dtypes[2] is not None)
    parts = parts_of(shape[0], windows * heads)
    launch = Launch(
        grad_window_attention_kernel,
        (windows * heads, parts),
        numbers,
        constants,
        {"num_warps": warps_for(dtypes[0]), "num_stages": 1},
    )
    tile = {"WH": window[0], "WW": window[1], "BLOCK": constants["BLOCK"], "AT_A_TIME": 32}
    add_up = Launch(
        grad_table_kernel,
        (heads * (2 * window[0] - 1) * (2 * window[1] - 1), 1),
        (windows * parts, heads),
        tile,
        {"num_warps": 4, "num_stages": 1},
    )
    return launch, add_up, windows * parts


def parts_of(pictures: int, programs: int) -> int:
    """Into how many parts pictures are split, with as many programs for each of them.

    Programs run in rounds of as many as there is room for, the last of which may be nearly empty.
    """
    room = PROGRAMS * MULTIPROCESSORS

    def time(parts: int) -> int:
        rounds = triton.cdiv(programs * parts, room)
        return rounds * (triton.cdiv(pictures, parts) + BESIDE)

    return min(range(1, min(pictures, room) + 1), key=time)

"""The gradients of a gated convolution by its input, its taps and its bias.

    dh      = SiLU'(h) (du correlated with the taps turned by half a turn)
    dtap_ij = sum_yx SiLU(h)[y + i - 1, x + j - 1] du[y, x],    dbias = sum_yx du[y, x]

h and du, the gradient of u that `gated_conv.py` makes, `(B, H, W, C)`, taps `(9, C)` -> dh
`(B, H, W, C)`, and the sums of each program, `(programs, 10, C)`: nine of taps and one of bias. C
is the number of all channels: values and gates are alike here.

A pixel of h is multiplied with the same nine of du in dh as in the sums. A program goes down some
rows of a strip, with three rows of du at hand, of which each is read once. `add_up.py` adds up
the sums.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .add_up import plan_add_up
from .gated_conv import Strips, load_taps, silu_and_slope, strip_of
from .launch import Launch, kernel
from .tiling import Tiling

# As in `gated_conv.py`.
_ROWS = 32
_PROGRAMS = 1024


@triton.jit
def load_row(p, step, m_l, m_0, m_1, m_2, m_3, m_r, ACC: tl.constexpr):
    """Four pixels, and their neighbours at both sides."""
    b_l = tl.load(p - step, mask=m_l, other=0.0).to(ACC)
    b_0 = tl.load(p, mask=m_0, other=0.0).to(ACC)
    b_1 = tl.load(p + step, mask=m_1, other=0.0).to(ACC)
    b_2 = tl.load(p + 2 * step, mask=m_2, other=0.0).to(ACC)
    b_3 = tl.load(p + 3 * step, mask=m_3, other=0.0).to(ACC)
    b_r = tl.load(p + 4 * step, mask=m_r, other=0.0).to(ACC)
    return b_l, b_0, b_1, b_2, b_3, b_r


@triton.jit
def turned(
    t_l, t_m, t_r, m_l, m_m, m_r, b_l, b_m, b_r, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8
):
    """The sum of nine pixels of the rows at the top, in the middle and below, the last tap first.

    Tap 0 led from the pixel here to the result below it on the right.
    """
    y = t_l * w_8 + t_m * w_7 + t_r * w_6
    y = y + m_l * w_5 + m_m * w_4 + m_r * w_3
    return y + b_l * w_2 + b_m * w_1 + b_r * w_0


@triton.jit
def add_products(k_0, k_1, k_2, s_0, s_1, s_2, s_3, b_l, b_0, b_1, b_2, b_3, b_r):
    """Adds four pixels of SiLU(h) times a row of du to the sums of a row of taps."""
    k_0 = k_0 + s_0 * b_1 + s_1 * b_2 + s_2 * b_3 + s_3 * b_r
    k_1 = k_1 + s_0 * b_0 + s_1 * b_1 + s_2 * b_2 + s_3 * b_3
    k_2 = k_2 + s_0 * b_l + s_1 * b_0 + s_2 * b_1 + s_3 * b_2
    return k_0, k_1, k_2


@triton.jit
def store_sum(p, x, mask):
    tl.store(p, tl.sum(x, 0), mask=mask)


@kernel
def gated_conv_backward_kernel(
    h, du, taps, dh, sums,
    height: "i64", width: "i64", channels: "i64", rows: "i64",
    blocks: "i32", strips: "i32", chunks: "i32",
    UNIT: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_c, m_c, i_s, i_b, first, o_x, m_l, m_0, m_1, m_2, m_3, m_r = strip_of(
        width, channels, rows, blocks, strips, chunks, UNIT, QUADS, BLOCK
    )
    C = channels * UNIT
    if dh is not None:
        w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8 = load_taps(taps + o_c, C, m_c, ACC)
    zero = tl.zeros((QUADS, BLOCK), ACC)
    t_l, t_0, t_1, t_2, t_3, t_r = zero, zero, zero, zero, zero, zero
    # Another value than `zero`: Triton takes a variable that becomes what it was, by identity, for
    # one that does not change, and t becomes c.
    below = tl.zeros((QUADS, BLOCK), ACC)
    c_l, c_0, c_1, c_2, c_3, c_r = below, below, below, below, below, below
    if sums is not None:
        k_0, k_1, k_2, k_3, k_4, k_5, k_6, k_7, k_8 = (
            zero, zero, zero, zero, zero, zero, zero, zero, zero,
        )  # fmt: skip
        k_b = zero
    steps = tl.minimum(rows, height - first) + 2
    row = first - 1 + tl.arange(0, 1)
    o_h = ((i_b * height + first - 2) * width + o_x[:, None]) * C + o_c[None, :]
    p_d = du + ((i_b * height + first - 1) * width + o_x[:, None]) * C + o_c[None, :]
    for _ in range(0, steps):
        # The row of du below the row of h, of which the other two are at hand.
        there = ((row >= 0) & (row < height))[None, :]
        b_l, b_0, b_1, b_2, b_3, b_r = load_row(
            p_d, C,
            m_l & there, m_0 & there, m_1 & there, m_2 & there, m_3 & there, m_r & there, ACC,
        )  # fmt: skip
        complete = (row > first)[None, :]
        p_h = h + o_h
        s_0, d_0 = silu_and_slope(tl.load(p_h, mask=m_0 & complete, other=0.0).to(ACC))
        s_1, d_1 = silu_and_slope(tl.load(p_h + C, mask=m_1 & complete, other=0.0).to(ACC))
        s_2, d_2 = silu_and_slope(tl.load(p_h + 2 * C, mask=m_2 & complete, other=0.0).to(ACC))
        s_3, d_3 = silu_and_slope(tl.load(p_h + 3 * C, mask=m_3 & complete, other=0.0).to(ACC))
        if dh is not None:
            p_dh = dh + o_h
            d_0 *= turned(
                t_l, t_0, t_1, c_l, c_0, c_1, b_l, b_0, b_1,
                w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8,
            )  # fmt: skip
            d_1 *= turned(
                t_0, t_1, t_2, c_0, c_1, c_2, b_0, b_1, b_2,
                w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8,
            )  # fmt: skip
            d_2 *= turned(
                t_1, t_2, t_3, c_1, c_2, c_3, b_1, b_2, b_3,
                w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8,
            )  # fmt: skip
            d_3 *= turned(
                t_2, t_3, t_r, c_2, c_3, c_r, b_2, b_3, b_r,
                w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8,
            )  # fmt: skip
            tl.store(p_dh, d_0.to(dh.dtype.element_ty), mask=m_0 & complete)
            tl.store(p_dh + C, d_1.to(dh.dtype.element_ty), mask=m_1 & complete)
            tl.store(p_dh + 2 * C, d_2.to(dh.dtype.element_ty), mask=m_2 & complete)
            tl.store(p_dh + 3 * C, d_3.to(dh.dtype.element_ty), mask=m_3 & complete)
        if sums is not None:
            # A row of taps at the top meets the row of du below.
            k_0, k_1, k_2 = add_products(
                k_0, k_1, k_2, s_0, s_1, s_2, s_3, b_l, b_0, b_1, b_2, b_3, b_r
            )
            k_3, k_4, k_5 = add_products(
                k_3, k_4, k_5, s_0, s_1, s_2, s_3, c_l, c_0, c_1, c_2, c_3, c_r
            )
            k_6, k_7, k_8 = add_products(
                k_6, k_7, k_8, s_0, s_1, s_2, s_3, t_l, t_0, t_1, t_2, t_3, t_r
            )
            k_b += tl.where(complete, c_0 + c_1 + (c_2 + c_3), 0.0)
        t_l, t_0, t_1, t_2, t_3, t_r = c_l, c_0, c_1, c_2, c_3, c_r
        c_l, c_0, c_1, c_2, c_3, c_r = b_l, b_0, b_1, b_2, b_3, b_r
        row += 1
        o_h += width * C
        p_d += width * C
    if sums is not None:
        p_s = sums + i_s.to(tl.int64) * (10 * C) + o_c
        store_sum(p_s, k_0, m_c)
        store_sum(p_s + C, k_1, m_c)
        store_sum(p_s + 2 * C, k_2, m_c)
        store_sum(p_s + 3 * C, k_3, m_c)
        store_sum(p_s + 4 * C, k_4, m_c)
        store_sum(p_s + 5 * C, k_5, m_c)
        store_sum(p_s + 6 * C, k_6, m_c)
        store_sum(p_s + 7 * C, k_7, m_c)
        store_sum(p_s + 8 * C, k_8, m_c)
        store_sum(p_s + 9 * C, k_b, m_c)


@lru_cache(maxsize=1024)
def plan_gated_conv_backward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dtype_taps: torch.dtype,
    others: tuple[torch.dtype | None, ...],
) -> tuple[Launch, Launch | None, tuple[int, int, int]]:
    """Two launches, and the shape of the sums between them.

    shape: of h `(B, H, W, C)`. others: dtypes of dweight and dbias; without both there are no sums.
    """
    B, _, _, C = shape
    strips = Strips.of(shape, dtype.itemsize, _ROWS, _PROGRAMS)
    programs = B * strips.chunks * strips.strips
    add_up = plan_add_up(C, C, programs, 9, Tiling.acc(dtype), others)
    return (
        strips.launch(gated_conv_backward_kernel, shape, dtype),
        add_up if any(others) else None,
        (programs, 10, C),
    )

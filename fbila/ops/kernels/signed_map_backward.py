"""The gradients of a signed map by its input and its table.

    "power"    u = |x| / s,  g = dy u^(p - 1),  h = sign(x) u g
               dx = (p / s) g        ds = -(p / s) sum h        dp = sum h log(u)
    "expm1"    g = dy exp(s |x|)
               dx = s g              ds = sum x g, over those x whose s it is

dy and dopposite, of y and of the opposite that `signed_map.py` makes of x, either of them None ->
dx, dense and token-major, and the sums of each program, `(programs, T, H, d)`. The map is found
again. Where m is beyond float16, and so a constant, and at x = 0 the gradient is 0, selected and
not multiplied: 0 * inf would be NaN.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .features import exp
from .launch import Launch, kernel
from .signed_map import Strips, load_row, load_sum, place_of, power_and_log2

# Tiles have half as many tokens as forward, for sums in registers; as many programs as run at one
# time, for few sums.
_SHARE, _PROGRAMS = 2, 2048


@triton.jit
def load_gradient(dy, o_y, dopposite, o_o, mask, ACC: tl.constexpr):
    """Of the map where its opposite is its negative."""
    if dy is None:
        return -tl.load(dopposite + o_o, mask=mask, other=0.0).to(ACC)
    elif dopposite is None:
        return tl.load(dy + o_y, mask=mask, other=0.0).to(ACC)
    else:
        b_d = tl.load(dy + o_y, mask=mask, other=0.0).to(ACC)
        return b_d - tl.load(dopposite + o_o, mask=mask, other=0.0).to(ACC)


@triton.jit
def within(g, m, x, HALF: tl.constexpr):
    """g, 0 where m or x is constant."""
    if HALF:
        g = tl.where(m > 65504.0, 0.0, g)
    return tl.where(x == 0, 0.0, g)


@triton.jit
def store_sum(p, x, mask):
    tl.store(p, tl.sum(x, 0), mask=mask)


@kernel
def signed_map_backward_kernel(
    x, addend, table, dy, dopposite, dx, sums,
    stride_xb: "i64", stride_xh: "i64", stride_xn: "i64",
    stride_yb: "i64", stride_yh: "i64", stride_yn: "i64",
    stride_ob: "i64", stride_oh: "i64", stride_on: "i64",
    stride_db: "i64", stride_dh: "i64", stride_dn: "i64",
    rows: "i64", run: "i64", heads: "i32", parts: "i32", blocks: "i32",
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    i_b, i_h, i_p, first, last, o_c, m_c, o_t = place_of(
        rows, run, heads, parts, blocks, C, UNIT, BLOCK_N, BLOCK_C
    )
    total = heads * C
    t_0 = load_row(table, 0, total, o_t, m_c, ACC)
    t_1 = load_row(table, 1, total, o_t, m_c, ACC)
    s_0 = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    s_1 = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    if KIND == "power":
        t_0 = 1.0 / t_0
        factor = t_1 * t_0
    elif dopposite is not None:
        t_2 = load_row(table, 2, total, o_t, m_c, ACC)
        t_3 = load_row(table, 3, total, o_t, m_c, ACC)
        s_2 = tl.zeros((BLOCK_N, BLOCK_C), ACC)
        s_3 = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    o_n = first + tl.arange(0, BLOCK_N)
    o_x = (i_b * stride_xb + i_h * stride_xh + o_n[:, None] * stride_xn) * UNIT + o_c[None, :]
    o_y = (i_b * stride_yb + i_h * stride_yh + o_n[:, None] * stride_yn) * UNIT + o_c[None, :]
    o_o = (i_b * stride_ob + i_h * stride_oh + o_n[:, None] * stride_on) * UNIT + o_c[None, :]
    o_a = (i_h * stride_dh + o_n[:, None] * stride_dn) * UNIT + o_c[None, :]
    if dx is not None:
        dx += i_b * stride_db * UNIT
    for _ in range(first, last, BLOCK_N):
        mask = (o_n < last)[:, None] & m_c[None, :]
        b_x = load_sum(x, o_x, addend, o_a, mask, ACC)
        size = tl.abs(b_x)
        if KIND == "power":
            b_d = load_gradient(dy, o_y, dopposite, o_o, mask, ACC)
            b_u = size * t_0
            b_w, log = power_and_log2(b_u, t_1 - 1.0)
            b_g = within(b_d * b_w, b_u * b_w, b_x, HALF)
            b_dx = b_g * factor
            if sums is not None:
                b_g = tl.where(b_x < 0, -b_g, b_g) * b_u
                s_0 += b_g
                s_1 += b_g * log
        else:
            b_dx = tl.zeros((BLOCK_N, BLOCK_C), ACC)
            if dy is not None:
                b_d = tl.load(dy + o_y, mask=mask, other=0.0).to(ACC)
                b_s = tl.where(b_x > 0, t_0, t_1)
                b_e = exp(size * b_s)
                b_g = within(b_d * b_e, b_e - 1.0, b_x, HALF)
                b_dx += b_g * b_s
                if sums is not None:
                    b_g *= b_x
                    s_0 += tl.where(b_x > 0, b_g, 0.0)
                    s_1 += tl.where(b_x > 0, 0.0, b_g)
            if dopposite is not None:
                b_d = tl.load(dopposite + o_o, mask=mask, other=0.0).to(ACC)
                b_s = tl.where(b_x < 0, t_2, t_3)
                b_e = exp(size * b_s)
                b_g = within(b_d * b_e, b_e - 1.0, b_x, HALF)
                b_dx -= b_g * b_s
                if sums is not None:
                    b_g *= b_x
                    s_2 -= tl.where(b_x < 0, b_g, 0.0)
                    s_3 -= tl.where(b_x < 0, 0.0, b_g)
        if dx is not None:
            tl.store(dx + o_a, b_dx.to(dx.dtype.element_ty), mask=mask)
        o_n += BLOCK_N
        o_x += BLOCK_N * stride_xn * UNIT
        o_y += BLOCK_N * stride_yn * UNIT
        o_o += BLOCK_N * stride_on * UNIT
        o_a += BLOCK_N * stride_dn * UNIT
    if sums is not None:
        ROWS: tl.constexpr = 4 if KIND == "expm1" and dopposite is not None else 2
        p_s = sums + (i_b * parts + i_p) * ROWS * total + o_t
        if KIND == "power":
            s_0 *= -factor
            s_1 *= tl.full((), 0.6931471805599453, ACC)
        store_sum(p_s, s_0, m_c)
        store_sum(p_s + total, s_1, m_c)
        if ROWS == 4:
            store_sum(p_s + 2 * total, s_2, m_c)
            store_sum(p_s + 3 * total, s_3, m_c)


@lru_cache(maxsize=1024)
def plan_signed_map_backward(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype | None, ...],
    kind: str,
) -> tuple[Launch, int]:
    """A launch, and how many programs have sums of the same channels.

    strides: of x, dy and dopposite. dtypes: of x, addend, dy and dopposite, and of the table, for
    which it is compiled too.
    """
    by_item = dtypes[1] is not None
    strips = Strips.of(shape, strides, dtypes[:4], by_item, _SHARE, _PROGRAMS)
    launch = strips.launch(signed_map_backward_kernel, kind, dtypes[0])
    return launch, strips.items * strips.parts

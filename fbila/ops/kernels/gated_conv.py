"""The middle of a gated convolutional feed-forward layer, from hidden layer to hidden layer.

    u = dwconv(SiLU(h)) + bias,   y = a SiLU(g),   u = [a, g]

h `(B, H, W, 2 C)`, taps `(9, 2 C)`, bias `(2 C,)` or None -> y `(B, H, W, C)`: a depthwise
3 x 3 convolution with zeros around SiLU(h), and the halves of its channels as value and gate. It is
computed in float32 and rounded once.

A program goes down some rows of a strip of the picture, for a block of channels. A row of h is a
part of three rows of u, of which the one above is complete then; what is known of the others is
kept. A thread has four pixels side by side, for which it takes SiLU of six. SiLU is what takes
longest, longer than memory, and would be taken of every element nine times otherwise.

Given dy, the gradient of y, it is the gradient of u in place of y, `(B, H, W, 2 C)`, with u found
again: da = dy SiLU(g), dg = dy a SiLU'(g). What follows from it is in `gated_conv_backward.py`.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .channels import inside
from .features import exp
from .launch import Launch, kernel
from .tiling import Tiling

_WARPS = 4
# A thread's channels. The 18 taps of each stay in its registers, which leave no room for more; a
# warp reads 128 bytes of 16-bit channels side by side.
_CHANNELS = 2
# Fours of pixels across a strip at most, and its rows, of which two more are read than written.
_QUADS, _ROWS = 4, 32
# Enough for every multiprocessor several times.
_PROGRAMS = 1024


@triton.jit
def silu(x):
    d = 1.0 + exp(-x)
    if x.dtype == tl.float32:
        # A division spends twice as much, on what is beyond 2^126.
        r = tl.rsqrt(d)
        return x * r * r
    else:
        return x / d


@triton.jit
def silu_and_slope(x):
    """SiLU(x) and SiLU'(x) = p + SiLU(x) (1 - p), p = sigmoid(x)."""
    d = 1.0 + exp(-x)
    if x.dtype == tl.float32:
        r = tl.rsqrt(d)
        p = r * r
    else:
        p = 1.0 / d
    s = x * p
    return s, p + s * (1.0 - p)


@triton.jit
def load_silu(p, mask, ACC: tl.constexpr):
    return silu(tl.load(p, mask=mask, other=0.0).to(ACC))


@triton.jit
def load_channels(p, mask, ACC: tl.constexpr):
    return tl.load(p, mask=mask, other=0.0).to(ACC)[None, :]


@triton.jit
def load_taps(p, step, mask, ACC: tl.constexpr):
    """The nine of each channel, row by row, `step` elements from one to the next."""
    w_0 = load_channels(p, mask, ACC)
    w_1 = load_channels(p + step, mask, ACC)
    w_2 = load_channels(p + 2 * step, mask, ACC)
    w_3 = load_channels(p + 3 * step, mask, ACC)
    w_4 = load_channels(p + 4 * step, mask, ACC)
    w_5 = load_channels(p + 5 * step, mask, ACC)
    w_6 = load_channels(p + 6 * step, mask, ACC)
    w_7 = load_channels(p + 7 * step, mask, ACC)
    w_8 = load_channels(p + 8 * step, mask, ACC)
    return w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8


@triton.jit
def convolve(b, l, m, r, w_l, w_m, w_r):
    return b + l * w_l + m * w_m + r * w_r


@triton.jit
def add_row(
    p, step, m_l, m_0, m_1, m_2, m_3, m_r, a_0, a_1, a_2, a_3, l_0, l_1, l_2, l_3,
    bias, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7, w_8, ACC: tl.constexpr,
):  # fmt: skip
    """Adds a row of h to four pixels of the rows of u above it (a), level with it (l) and below it.

    Returns the row above, which is complete, and what is a and l to the next row of h.
    """
    s_l = load_silu(p - step, m_l, ACC)
    s_0 = load_silu(p, m_0, ACC)
    s_1 = load_silu(p + step, m_1, ACC)
    s_2 = load_silu(p + 2 * step, m_2, ACC)
    s_3 = load_silu(p + 3 * step, m_3, ACC)
    s_r = load_silu(p + 4 * step, m_r, ACC)
    c_0 = convolve(a_0, s_l, s_0, s_1, w_6, w_7, w_8)
    c_1 = convolve(a_1, s_0, s_1, s_2, w_6, w_7, w_8)
    c_2 = convolve(a_2, s_1, s_2, s_3, w_6, w_7, w_8)
    c_3 = convolve(a_3, s_2, s_3, s_r, w_6, w_7, w_8)
    a_0 = convolve(l_0, s_l, s_0, s_1, w_3, w_4, w_5)
    a_1 = convolve(l_1, s_0, s_1, s_2, w_3, w_4, w_5)
    a_2 = convolve(l_2, s_1, s_2, s_3, w_3, w_4, w_5)
    a_3 = convolve(l_3, s_2, s_3, s_r, w_3, w_4, w_5)
    l_0 = convolve(bias, s_l, s_0, s_1, w_0, w_1, w_2)
    l_1 = convolve(bias, s_0, s_1, s_2, w_0, w_1, w_2)
    l_2 = convolve(bias, s_1, s_2, s_3, w_0, w_1, w_2)
    l_3 = convolve(bias, s_2, s_3, s_r, w_0, w_1, w_2)
    return c_0, c_1, c_2, c_3, a_0, a_1, a_2, a_3, l_0, l_1, l_2, l_3


@triton.jit
def store_pixel(y, o_y, dy, o_dy, C, a, g, mask):
    """y, or both halves of the gradient of u in its place."""
    if dy is None:
        tl.store(y + o_y, (a * silu(g)).to(y.dtype.element_ty), mask=mask)
    else:
        d = tl.load(dy + o_dy, mask=mask, other=0.0).to(a.dtype)
        s, slope = silu_and_slope(g)
        tl.store(y + o_y, (d * s).to(y.dtype.element_ty), mask=mask)
        tl.store(y + o_y + C, (d * a * slope).to(y.dtype.element_ty), mask=mask)


@triton.jit
def strip_of(
    width, channels, rows, blocks, strips, chunks,
    UNIT: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's channels and their mask; its place among those with these, its sample and its
    first row; its pixels, every fourth of them, and which of those and their neighbours there are.
    """
    # Programs that run together read channels that are side by side.
    o_c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_s = tl.program_id(0) // blocks
    strip = (i_s % strips).to(tl.int64)
    first = (i_s // strips % chunks).to(tl.int64) * rows
    i_b = (i_s // strips // chunks).to(tl.int64)
    o_x = strip * (4 * QUADS) + 4 * tl.arange(0, QUADS)
    m_c = inside(o_c, channels, UNIT)
    m_l = ((o_x > 0) & (o_x <= width))[:, None] & m_c[None, :]
    m_0 = (o_x < width)[:, None] & m_c[None, :]
    m_1 = (o_x + 1 < width)[:, None] & m_c[None, :]
    m_2 = (o_x + 2 < width)[:, None] & m_c[None, :]
    m_3 = (o_x + 3 < width)[:, None] & m_c[None, :]
    m_r = (o_x + 4 < width)[:, None] & m_c[None, :]
    return o_c, m_c, i_s, i_b, first, o_x, m_l, m_0, m_1, m_2, m_3, m_r


@kernel
def gated_conv_kernel(
    h, taps, bias, dy, y,
    height: "i64", width: "i64", channels: "i64", rows: "i64",
    blocks: "i32", strips: "i32", chunks: "i32",
    UNIT: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_c, m_c, _, i_b, first, o_x, m_l, m_0, m_1, m_2, m_3, m_r = strip_of(
        width, channels, rows, blocks, strips, chunks, UNIT, QUADS, BLOCK
    )
    C = channels * UNIT
    # Of the values and of the gates.
    w_a0, w_a1, w_a2, w_a3, w_a4, w_a5, w_a6, w_a7, w_a8 = load_taps(taps + o_c, 2 * C, m_c, ACC)
    w_g0, w_g1, w_g2, w_g3, w_g4, w_g5, w_g6, w_g7, w_g8 = load_taps(
        taps + C + o_c, 2 * C, m_c, ACC
    )
    b_a = tl.zeros((1, BLOCK), ACC)
    b_g = b_a
    if bias is not None:
        b_a = load_channels(bias + o_c, m_c, ACC)
        b_g = load_channels(bias + C + o_c, m_c, ACC)
    zero = tl.zeros((QUADS, BLOCK), ACC)
    a_a0, a_a1, a_a2, a_a3 = zero, zero, zero, zero
    a_l0, a_l1, a_l2, a_l3 = zero, zero, zero, zero
    g_a0, g_a1, g_a2, g_a3 = zero, zero, zero, zero
    g_l0, g_l1, g_l2, g_l3 = zero, zero, zero, zero
    steps = tl.minimum(rows, height - first) + 2
    row = first - 1 + tl.arange(0, 1)
    p_h = h + ((i_b * height + first - 1) * width + o_x[:, None]) * (2 * C) + o_c[None, :]
    # Of half as many channels, and of as many as y has.
    o_half = ((i_b * height + first - 2) * width + o_x[:, None]) * C + o_c[None, :]
    wide = C if dy is None else 2 * C
    o_y = ((i_b * height + first - 2) * width + o_x[:, None]) * wide + o_c[None, :]
    for _ in range(0, steps):
        there = ((row >= 0) & (row < height))[None, :]
        a_0, a_1, a_2, a_3, a_a0, a_a1, a_a2, a_a3, a_l0, a_l1, a_l2, a_l3 = add_row(
            p_h, 2 * C,
            m_l & there, m_0 & there, m_1 & there, m_2 & there, m_3 & there, m_r & there,
            a_a0, a_a1, a_a2, a_a3, a_l0, a_l1, a_l2, a_l3,
            b_a, w_a0, w_a1, w_a2, w_a3, w_a4, w_a5, w_a6, w_a7, w_a8, ACC,
        )  # fmt: skip
        g_0, g_1, g_2, g_3, g_a0, g_a1, g_a2, g_a3, g_l0, g_l1, g_l2, g_l3 = add_row(
            p_h + C, 2 * C,
            m_l & there, m_0 & there, m_1 & there, m_2 & there, m_3 & there, m_r & there,
            g_a0, g_a1, g_a2, g_a3, g_l0, g_l1, g_l2, g_l3,
            b_g, w_g0, w_g1, w_g2, w_g3, w_g4, w_g5, w_g6, w_g7, w_g8, ACC,
        )  # fmt: skip
        complete = (row > first)[None, :]
        store_pixel(y, o_y, dy, o_half, C, a_0, g_0, m_0 & complete)
        store_pixel(y, o_y + wide, dy, o_half + C, C, a_1, g_1, m_1 & complete)
        store_pixel(y, o_y + 2 * wide, dy, o_half + 2 * C, C, a_2, g_2, m_2 & complete)
        store_pixel(y, o_y + 3 * wide, dy, o_half + 3 * C, C, a_3, g_3, m_3 & complete)
        row += 1
        p_h += width * (2 * C)
        o_half += width * C
        o_y += width * wide


class Strips(NamedTuple):
    """How a picture is divided among programs: the constants and the numbers of a kernel."""

    quads: int
    block: int
    rows: int
    chunks: int
    strips: int
    blocks: int
    unit: int

    @staticmethod
    def of(shape: tuple[int, ...], itemsize: int, most_rows: int, least: int) -> "Strips":
        """For results `(B, H, W, C)`; `least` programs, as far as there are four rows for each."""
        B, H, W, C = shape
        fours = triton.cdiv(W, 4)
        # In 4 bytes wider strips spill; and they must not cover more beyond a picture's edge.
        quads = _QUADS if itemsize == 2 and triton.cdiv(fours, 2) % 2 == 0 else _QUADS // 2
        quads = min(quads, triton.next_power_of_2(fours))
        block = min(_CHANNELS * 32 * _WARPS // quads, triton.next_power_of_2(C))
        strips, blocks = triton.cdiv(W, 4 * quads), triton.cdiv(C, block)
        chunks = triton.cdiv(H, most_rows)
        while B * strips * blocks * chunks < least and triton.cdiv(H, chunks) > 4:
            chunks *= 2
        rows = triton.cdiv(H, chunks)
        unit = math.gcd(16 // itemsize, C)
        return Strips(quads, block, rows, triton.cdiv(H, rows), strips, blocks, unit)

    def launch(self, kernel: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Launch:
        B, H, W, C = shape
        return Launch(
            kernel,
            (B * self.chunks * self.strips * self.blocks, 1),
            (H, W, C // self.unit, self.rows, self.blocks, self.strips, self.chunks),
            {
                "UNIT": self.unit,
                "QUADS": self.quads,
                "BLOCK": self.block,
                "ACC": Tiling.acc(dtype),
            },
            {"num_warps": _WARPS, "num_stages": 1},
        )


@lru_cache(maxsize=1024)
def plan_gated_conv(
    shape: tuple[int, ...], dtype: torch.dtype, others: tuple[torch.dtype | None, ...]
) -> Launch:
    """For y `(B, H, W, C)`; others: dtypes of taps, bias and dy, which it is compiled for too."""
    strips = Strips.of(shape, dtype.itemsize, _ROWS, _PROGRAMS)
    return strips.launch(gated_conv_kernel, shape, dtype)

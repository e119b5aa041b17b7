"""Elementwise maps of queries and keys that keep the sign, with parameters for each channel.

    y = sign(x) m(|x|)        "power": m(a) = (a / s)^p        "expm1": m(a) = exp(s a) - 1

x `(B, H, N, d)`, of any strides in which channels lie side by side -> y, token-major `(B, N, H, d)`
in memory, computed in float32 and rounded once; in float16 m is at most 65504. table `(T, H, d)`:
s and p for "power", s of positive and of negative x for "expm1", or None for 1. addend `(N, H, d)`
is added to x first, rounded as x is.

`opposite`, as y, is what the map makes of -x: -y for "power", while "expm1" has two more rows of
the table for it.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .features import exp
from .focus import tile
from .launch import Launch, kernel
from .tiling import Tiling

# As many as run at one time, twice.
_PROGRAMS = 4096


@triton.jit
def power_and_log2(u, p):
    """u^p and log2(u) of u >= 0, for p > 0; log2(0) is any finite number.

    In float32 an error of the logarithm would be multiplied by p and by its own size. So it is
    taken in two pieces, an integer and less than half, p times the first without an error in all
    but the last bits of p, and what the sum of both loses is put back.
    """
    if u.dtype == tl.float64:
        log = tl.where(u > 0, tl.log2(u), 0.0)
        y = tl.exp2(p * log)
    else:
        bits = u.to(tl.int32, bitcast=True)
        # Of what is at least half the square root of 2, and of that the fraction to the root of 2.
        whole = (bits - 0x3F3504F3) >> 23
        f = (bits - (whole << 23)).to(tl.float32, bitcast=True) - 1.0
        e = whole.to(tl.float32)
        # log2(1 + f) / f, within 5e-8 / f.
        q = -0.14574436843395233 * f + 0.23689033091068268
        q = q * f - 0.2500690519809723
        q = q * f + 0.28670746088027954
        q = q * f - 0.36008721590042114
        q = q * f + 0.48093944787979126
        q = q * f - 0.7213571667671204
        part = (q * f + 1.4426947832107544) * f
        high = (p.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        rest = (p - high) * e + p * part
        total = high * e + rest
        lost = (high * e - total) + rest
        y = tl.exp2(total) * (1.0 + 0.6931471805599453 * lost)
        log = e + part
    # 0 and NaN, which have no such bits.
    return tl.where(u > 0, y, u), log


@triton.jit
def expm1(t):
    """e^t - 1 of t >= 0. Where e^t is near 1 by the series, which loses nothing."""
    if t.dtype == tl.float64:
        series = tl.full(t.shape, 1.0, t.dtype)
        for k in tl.static_range(14, 1, -1):
            series = 1.0 + series * t / k
    else:
        series = t * 0.0001984126984126984 + 0.001388888888888889
        series = series * t + 0.008333333333333333
        series = series * t + 0.041666666666666664
        series = series * t + 0.16666666666666666
        series = series * t + 0.5
        series = series * t + 1.0
    return tl.where(t < 0.35, series * t, exp(t) - 1.0)


@triton.jit
def load_row(table, t, total, o_c, m_c, ACC: tl.constexpr):
    """A row of the table; 1 where there are no channels, and where there is no table."""
    if table is None:
        return tl.full((1, o_c.shape[0]), 1.0, ACC)
    else:
        return tl.load(table + t * total + o_c, mask=m_c, other=1.0).to(ACC)[None, :]


@triton.jit
def load_sum(x, o_x, addend, o_a, mask, ACC: tl.constexpr):
    """x + addend, rounded as x is."""
    b_x = tl.load(x + o_x, mask=mask, other=0.0)
    if addend is not None:
        b_a = tl.load(addend + o_a, mask=mask, other=0.0).to(b_x.dtype)
        b_x = (b_x.to(ACC) + b_a.to(ACC)).to(b_x.dtype)
    return b_x.to(ACC)


@triton.jit
def store_signed(p, x, m, mask):
    """sign(x) m, as far as float16 goes."""
    if p.dtype.element_ty == tl.float16:
        m = tl.where(m > 65504.0, 65504.0, m)
    tl.store(p, tl.where(x < 0, -m, m).to(p.dtype.element_ty), mask=mask)


@triton.jit
def place_of(
    rows, run, heads, parts, blocks,
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's item, head and part of the rows; where these begin and end; its channels, their
    mask, and their place in a row of the table.
    """
    # Programs that run together read channels that are side by side.
    i_c = tl.program_id(0) % blocks
    i_p = tl.program_id(0) // blocks
    i_h = (i_p // parts % heads).to(tl.int64)
    i_b = (i_p // parts // heads).to(tl.int64)
    i_p = (i_p % parts).to(tl.int64)
    first = i_p * run * BLOCK_N
    last = tl.minimum(rows, first + run * BLOCK_N)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_b, i_h, i_p, first, last, o_c, o_c < C, i_h * C + o_c


@kernel
def signed_map_kernel(
    x, addend, table, y, opposite,
    stride_xb: "i64", stride_xh: "i64", stride_xn: "i64",
    stride_yb: "i64", stride_yh: "i64", stride_yn: "i64",
    rows: "i64", run: "i64", heads: "i32", parts: "i32", blocks: "i32",
    C: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_h, _part, first, last, o_c, m_c, o_t = place_of(
        rows, run, heads, parts, blocks, C, UNIT, BLOCK_N, BLOCK_C
    )
    total = heads * C
    t_0 = load_row(table, 0, total, o_t, m_c, ACC)
    t_1 = load_row(table, 1, total, o_t, m_c, ACC)
    if KIND == "power":
        t_0 = 1.0 / t_0
    elif opposite is not None:
        t_2 = load_row(table, 2, total, o_t, m_c, ACC)
        t_3 = load_row(table, 3, total, o_t, m_c, ACC)
    # Strides are in units, which proves the alignment that 16-byte loads need.
    x += (i_b * stride_xb + i_h * stride_xh) * UNIT
    o_h = i_h * stride_yh * UNIT
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        mask = (o_n < last)[:, None] & m_c[None, :]
        o_x = o_n[:, None] * (stride_xn * UNIT) + o_c[None, :]
        o_a = o_h + o_n[:, None] * (stride_yn * UNIT) + o_c[None, :]
        o_y = i_b * stride_yb * UNIT + o_a
        b_x = load_sum(x, o_x, addend, o_a, mask, ACC)
        size = tl.abs(b_x)
        if KIND == "power":
            b_m, _ = power_and_log2(size * t_0, t_1)
            if opposite is not None:
                store_signed(opposite + o_y, -b_x, b_m, mask)
        else:
            b_m = expm1(size * tl.where(b_x > 0, t_0, t_1))
            if opposite is not None:
                b_o = expm1(size * tl.where(b_x < 0, t_2, t_3))
                store_signed(opposite + o_y, -b_x, b_o, mask)
        store_signed(y + o_y, b_x, b_m, mask)


class Strips(NamedTuple):
    """How tensors `(B, H, N, d)` are divided among programs: what the kernels are told of it.

    strides: of items, heads and rows for each tensor in turn, in units. Where heads lie side by
    side in all of them they are channels of one, and items that follow each other are rows of one.
    """

    strides: tuple[int, ...]
    items: int
    rows: int
    run: int
    heads: int
    parts: int
    blocks: int
    constants: dict[str, Any]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        dtypes: tuple[torch.dtype | None, ...],
        by_item: bool,
        share: int,
        programs: int,
    ) -> "Strips":
        """strides: of the tensors; a dense token-major one is added.

        dtypes: of x first. by_item: whether what is added belongs to an item's tokens. share: of
        the tile that a program has at a time, its inverse. programs: as many, if there are tiles
        for them.
        """
        B, H, N, d = shape
        items, heads, rows, channels = B, H, N, d
        steps = [list(stride[:3]) for stride in (*strides, (N * H * d, d, H * d))]
        if H == 1 or all(stride[1] == d for stride in steps):
            heads, channels = 1, H * d
        if not by_item and (N == 1 or all(stride[0] == N * stride[2] for stride in steps)):
            items, rows = 1, B * N
            if N == 1:
                steps = [[0, stride[1], stride[0]] for stride in steps]
        # An axis of length 1 may have any stride; it is never stepped along.
        there = [n > 1 for n in (items, heads, rows)]
        steps = [[s if n else 0 for s, n in zip(step, there, strict=True)] for step in steps]
        itemsize = min(dtype.itemsize for dtype in dtypes if dtype is not None)
        unit = math.gcd(16 // itemsize, *(s for step in steps for s in step))
        block_n, block_c = tile(channels, itemsize, "head_dim")
        block_n = block_n // share
        tiles, blocks = triton.cdiv(rows, block_n), triton.cdiv(channels, block_c)
        run = max(1, min(tiles, items * heads * tiles * blocks // programs))
        return Strips(
            tuple(s // unit for step in steps for s in step),
            items,
            rows,
            run,
            heads,
            triton.cdiv(tiles, run),
            blocks,
            {"C": channels, "UNIT": unit, "BLOCK_N": block_n, "BLOCK_C": block_c},
        )

    def launch(self, kernel: Any, kind: str, dtype: torch.dtype | None) -> Launch:
        assert dtype is not None
        return Launch(
            kernel,
            (self.items * self.heads * self.parts * self.blocks, 1),
            (*self.strides, self.rows, self.run, self.heads, self.parts, self.blocks),
            {**self.constants, "KIND": kind, "ACC": Tiling.acc(dtype)},
            {"num_warps": 4, "num_stages": 1},
        )


@lru_cache(maxsize=1024)
def plan_signed_map(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    kind: str,
) -> Launch:
    """stride: of x. dtypes: of x and addend, and of the table, for which it is compiled too."""
    by_item = dtypes[1] is not None
    strips = Strips.of(shape, (stride,), dtypes[:2], by_item, 1, _PROGRAMS)
    return strips.launch(signed_map_kernel, kind, dtypes[0])

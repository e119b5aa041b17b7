"""y = (1 + eps + s) a - s m, of a number s for each token and m for each channel, and its gradients

    da = (1 + eps + s) dy        ds_i = sum_d dy_id (a_id - m_d)        dm = -sum_i s_i dy_i

a, y, da, dy `(B, H, N, d)`, dense in memory and all in one order, s and ds `(B, H, N, 1)` in the
same, m `(B, H, 1, d)`, contiguous -> y, or da, ds and sums of dm over parts of the tokens, `(B,
parts, H, d)`, which `add_up.py` adds up in one order every time. All of it in float32, or float64
where a is, rounded once. In the backward pass any result may be left out, and what it alone reads.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .add_up import plan_add_up
from .channels import inside, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile, 16 of each tensor for each of 128 threads; no head is wider.
ELEMENTS = 2048
# Such tiles of a program in the backward pass: its sums are few beside what it reads. As B and H do
# not enter, an item's bits are the same in any batch.
RUN = 8


@triton.jit
def program(tokens, heads, parts, UNIT: tl.constexpr, ORDER: tl.constexpr):
    """Item, head and part; tokens of a head, where the first is in s, and from each to the next."""
    # Heads are fastest: programs that run together share the lines they meet in.
    H, i = tl.cast(heads, tl.int64), tl.program_id(0) // heads
    i_h, i_b, i_p = tl.program_id(0) % heads, (i // parts).to(tl.int64), (i % parts).to(tl.int64)
    N = tl.cast(tokens, tl.int64) * UNIT
    if ORDER == "token_major":
        return i_b, i_h, i_p, N, i_b * N * H + i_h, H
    else:
        return i_b, i_h, i_p, N, (i_b * H + i_h) * N, 1


@triton.jit
def places(o_n, N, first, step, D: tl.constexpr, BLOCK: tl.constexpr, ORDER: tl.constexpr):
    """Where the tokens `o_n` of a head are in s, and their (tokens, BLOCK) channels in a."""
    o_c = tl.arange(0, BLOCK)[None, :]
    o_s = first + o_n * step
    if ORDER == "channels_first":
        return o_s, first * D + o_c * N + o_n[:, None]
    else:
        return o_s, o_s[:, None] * D + o_c


@kernel
def magnitude_kernel(
    a, s, mean, y, one: "fp64", tokens: "i32", heads: "i32", parts: "i32",
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_p, N, first, step = program(tokens, heads, parts, UNIT, ORDER)
    o_n, o_c = i_p * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_n, m_c = inside(o_n, tokens, UNIT), o_c < D
    o_s, o = places(o_n, N, first, step, D, BLOCK, ORDER)
    mask = m_n[:, None] & m_c[None, :]
    b_a = tl.load(a + o, mask=mask, other=0.0).to(ACC)
    b_s = tl.load(s + o_s, mask=m_n, other=0.0).to(ACC)[:, None]
    b_m = tl.load(mean + (i_b * heads + i_h) * D + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    b_y = (tl.full((), one, ACC) + b_s) * b_a - b_s * b_m
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=mask)


@kernel
def magnitude_backward_kernel(
    dy, a, s, mean, da, ds, sums, one: "fp64", factor: "fp64",
    tokens: "i32", heads: "i32", parts: "i32",
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_p, N, first, step = program(tokens, heads, parts, UNIT, ORDER)
    o_n, o_c = i_p * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_n, m_c = inside(o_n, tokens, UNIT), o_c < D
    o_s, o = places(o_n, N, first, step, D, BLOCK, ORDER)
    mask = m_n[:, None] & m_c[None, :]
    # The next tokens are on their way while these are multiplied.
    next_dy = tl.load(dy + o, mask=mask, other=0.0)
    if s is not None:
        next_s = tl.load(s + o_s, mask=m_n, other=0.0)
    if ds is not None:
        next_a = tl.load(a + o, mask=mask, other=0.0)
        b_m = tl.load(mean + (i_b * heads + i_h) * D + o_c, mask=m_c, other=0.0).to(ACC)[None, :]
    if sums is not None:
        total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    for _ in range(i_p * ROWS, N, parts * ROWS):
        b_dy, p_s, p, m_s, m_p = next_dy.to(ACC), o_s, o, m_n, mask
        if s is not None:
            b_s = next_s.to(ACC)[:, None]
        if ds is not None:
            b_a = next_a.to(ACC)
        o_n += parts * ROWS
        m_n = inside(o_n, tokens, UNIT)
        o_s, o = places(o_n, N, first, step, D, BLOCK, ORDER)
        mask = m_n[:, None] & m_c[None, :]
        next_dy = tl.load(dy + o, mask=mask, other=0.0)
        if s is not None:
            next_s = tl.load(s + o_s, mask=m_n, other=0.0)
        if ds is not None:
            next_a = tl.load(a + o, mask=mask, other=0.0)
            b_ds = tl.sum(b_dy * (b_a - b_m), 1)
            tl.store(ds + p_s, b_ds.to(ds.dtype.element_ty), mask=m_s)
        if da is not None:
            b_da = (tl.full((), one, ACC) + b_s) * b_dy
            tl.store(da + p, b_da.to(da.dtype.element_ty), mask=m_p)
        if sums is not None:
            total += b_s * b_dy
    if sums is not None:
        sums += ((i_b * parts + i_p) * heads + i_h) * D
        tl.store(sums + o_c, tl.sum(total, 0) * tl.full((), factor, ACC), mask=m_c)


def cut(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> tuple[dict, int, dict]:
    """The constants of a launch, how many tiles of tokens a head has, and the options."""
    _, _, N, D = shape
    assert D <= ELEMENTS
    block = triton.next_power_of_2(D)
    rows, unit = ELEMENTS // block, 1
    if order == "channels_first":
        # As many as fill lines, of a tile at most four times as large.
        rows = max(rows, min(128 // dtype.itemsize, 4 * rows))
        unit = math.gcd(16 // dtype.itemsize, N)
    rows = min(rows, triton.next_power_of_2(N))
    constants = {"D": D, "UNIT": unit, "ROWS": rows, "BLOCK": block, "ORDER": order}
    options = {"num_warps": warps(rows * block), "num_stages": 1}
    return constants, triton.cdiv(N, rows), options


@lru_cache(maxsize=1024)
def plan_magnitude(
    shape: tuple[int, ...], order: str, dtypes: tuple[torch.dtype, ...], eps: float
) -> Launch:
    """shape: Of a. dtypes: Of a, s, mean and y."""
    B, H, N, _ = shape
    constants, tiles, options = cut(shape, order, dtypes[0])
    return Launch(
        magnitude_kernel,
        (B * H * tiles, 1),
        (1 + eps, N // constants["UNIT"], H, tiles),
        {**constants, "ACC": Tiling.acc(dtypes[0])},
        options,
    )


@lru_cache(maxsize=1024)
def plan_magnitude_backward(
    shape: tuple[int, ...],
    order: str,
    dtypes: tuple[torch.dtype | None, ...],
    eps: float,
    keys: int,
) -> tuple[Launch, Launch, int]:
    """The launches of both kernels, and how many parts of tokens have sums between them.

    dtypes: Of dy, a, s, mean, da and ds; None for those that are missing. keys: What dm is divided
        by, for a gradient of that many values, which have dy's dtype.
    """
    B, H, N, D = shape
    constants, tiles, options = cut(shape, order, dtypes[0])
    run = max(1, RUN * ELEMENTS // (constants["ROWS"] * constants["BLOCK"]))
    parts, acc = triton.cdiv(tiles, run), Tiling.acc(dtypes[0])
    launch = Launch(
        magnitude_backward_kernel,
        (B * H * parts, 1),
        (1 + eps, -1 / keys, N // constants["UNIT"], H, parts),
        {**constants, "ACC": acc},
        options,
    )
    return launch, plan_add_up(H * D, B * H * D, parts, 0, acc, (None, dtypes[0])), parts

"""Rotary position embedding inside the kernels, on pairs of tiles.

A table `(1 or H, N, K)` holds cos and sin as the channels of a head lie: for pairs (2i, 2i + 1)
side by side, for pairs (i, i + K / 2) as two halves, which are then the tiles of the head dim.
"""

import triton
import triton.language as tl

from .masks import tile_mask


@triton.jit
def load_table(
    table, i_n, rows, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """cos and sin of ROWS tokens from `i_n` on, in the tiles of their channels."""
    pointer = table + ((i_n + tl.arange(0, ROWS)).to(tl.int64) * K)[:, None]
    t0 = tl.load(pointer + tl.arange(0, K0)[None, :], mask=tile_mask(rows, 0, K, K0, KB), other=0.0)
    t1 = t0
    if K1 > 0:
        columns = (KB + tl.arange(0, K1))[None, :]
        t1 = tl.load(pointer + columns, mask=tile_mask(rows, KB, K, K1, K1), other=0.0)
    return t0, t1


@triton.jit
def rotate(x0, x1, t0, t1, K1: tl.constexpr, ROTARY: tl.constexpr, BACK: tl.constexpr):
    """Both tiles rotated by the angles of the table, or back by them."""
    if ROTARY == "interleaved":
        x0 = rotate_tile(x0, t0, BACK)
        if K1 > 0:
            x1 = rotate_tile(x1, t1, BACK)
    elif ROTARY == "halves":
        cos, sin = t0.to(x0.dtype), t1.to(x0.dtype)
        if BACK:
            sin = -sin
        x0, x1 = x0 * cos - x1 * sin, x1 * cos + x0 * sin
    return x0, x1


@triton.jit
def rotate_tile(x, t, BACK: tl.constexpr):
    """A tile whose neighbouring columns are pairs."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    cos, sin = tl.split(tl.reshape(t.to(x.dtype), (ROWS, PAIRS, 2)))
    if BACK:
        sin = -sin
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * PAIRS))

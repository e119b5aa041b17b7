"""The kernels of `norm.py`: a tile is `(PIECES, BLOCK, PIECE)`, of rows cut into pieces.

Pieces come first, since what one thread holds of a row is added up within it.
"""

import triton
import triton.language as tl

from .launch import kernel


@triton.jit
def row_sums(b):
    return tl.sum(tl.sum(b, 0), 1)[None, :, None]


@triton.jit
def normalized(b_x, inside, eps, D: tl.constexpr, CENTRED: tl.constexpr, ACC: tl.constexpr):
    """Rows, zeros outside, over their deviation."""
    if CENTRED:
        b_x = tl.where(inside, b_x - row_sums(b_x) / D, 0.0)
    return b_x * (1.0 / tl.sqrt(row_sums(b_x * b_x) / D + tl.full((), eps, ACC)))


@triton.jit
def leaky_relu(b_x, slope, ACC: tl.constexpr):
    return tl.where(b_x < 0, b_x * tl.full((), slope, ACC), b_x)


@kernel
def norm_kernel(
    x, weight, bias, o,
    stride_xp: "i64", stride_xr: "i64", rows: "i64", eps: "fp64", slope: "fp64",
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, UNIT: tl.constexpr,
    CENTRED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of one piece each, a program for every tile."""
    i_p = tl.program_id(1).to(tl.int64)
    o_r = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :, None]
    o_d = tl.arange(0, PIECE)[None, None, :]
    inside = o_d < D
    mask = (o_r < rows) & inside
    # Strides are in units, which proves the alignment that 16-byte loads need.
    p_x = x + i_p * stride_xp * UNIT + o_r * stride_xr * UNIT + o_d
    b_x = tl.load(p_x, mask=mask, other=0.0).to(ACC)
    b_x = normalized(b_x, inside, eps, D, CENTRED, ACC)
    if weight is not None:
        b_x *= tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        b_x += tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    b_x = leaky_relu(b_x, slope, ACC)
    tl.store(o + (i_p * rows + o_r) * D + o_d, b_x.to(o.dtype.element_ty), mask=mask)


@kernel
def narrow_norm_kernel(
    x, weight, bias, o,
    stride_xp: "i64", stride_xr: "i64", rows: "i64", eps: "fp64", slope: "fp64",
    D: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    UNIT: tl.constexpr, CENTRED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For one warp, whose sums need no barrier: a program goes over tiles, weights loaded once."""
    i_p = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    o_b = tl.arange(0, BLOCK)[None, :, None]
    o_d = (tl.arange(0, PIECES) * PIECE)[:, None, None] + tl.arange(0, PIECE)[None, None, :]
    inside = o_d < D
    p_x = x + i_p * stride_xp * UNIT + o_d
    p_o = o + i_p * rows * D + o_d
    o_r = start + o_b
    b_next = tl.load(p_x + o_r * stride_xr * UNIT, mask=(o_r < rows) & inside, other=0.0)
    if weight is not None:
        b_w = tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        b_b = tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    for first in range(start, rows, step):
        # The next rows are on their way while these are normalised.
        b_x, o_r = b_next.to(ACC), first + step + o_b
        b_next = tl.load(p_x + o_r * stride_xr * UNIT, mask=(o_r < rows) & inside, other=0.0)
        b_x = normalized(b_x, inside, eps, D, CENTRED, ACC)
        if weight is not None:
            b_x *= b_w
        if bias is not None:
            b_x += b_b
        b_x = leaky_relu(b_x, slope, ACC).to(o.dtype.element_ty)
        o_r = first + o_b
        tl.store(p_o + o_r * D, b_x, mask=(o_r < rows) & inside)

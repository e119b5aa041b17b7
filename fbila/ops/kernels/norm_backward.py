"""The gradient of LayerNorm with LeakyReLU in one pass over x and the gradient of the output.

    h = (x - mean) r,  z = h w + b,  dz = dy (1 where z > 0, slope elsewhere)
    dx = r (w dz - mean(w dz) - h mean(w dz h))        dw = sum dz h        db = sum dz

x, dy `(P, R, D)` -> dx `(P, R, D)` contiguous, and the sums of each program, `(P, programs, 2, D)`,
of dw and of db, which `add_up.py` adds up. The statistics of a row are found again.

Without a bias there is no activation, and without a weight it is 1. Either result may be left out.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..memory_format import dtypes_of
from .add_up import plan_add_up
from .launch import Launch, kernel
from .norm import ELEMENTS, in_units
from .tiling import Tiling

# Bytes that one warp sums at a time, and of the longest rows that are no more than two warps'.
WARP, NARROW = 2048, 4096
# Multiprocessors of the largest GPU, and tiles of a program where that leaves one for each of them:
# its sums are about as many bytes as a tile.
MULTIPROCESSORS, TILES = 132, 4


@triton.jit
def row_sums(b):
    """Of tiles `(BLOCK, PIECES, PIECE)`, whose first axis Triton 3.6 deals out to warps."""
    return tl.sum(tl.sum(b, 1), 1)[:, None, None]


@kernel
def grad_norm_kernel(
    x, dy, weight, bias, dx, sums,
    stride_xp: "i64", stride_xr: "i64", stride_yp: "i64", stride_yr: "i64", rows: "i64",
    eps: "fp64", slope: "fp64",
    D: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(0).to(tl.int64)
    start, step = i_b * BLOCK, tl.num_programs(0) * BLOCK
    o_b = tl.arange(0, BLOCK)[:, None, None]
    o_d = (tl.arange(0, PIECES) * PIECE)[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    inside = o_d < D
    p_x = x + i_p * stride_xp * UNIT + o_d
    p_dy = dy + i_p * stride_yp * UNIT + o_d
    o_r = start + o_b
    mask = (o_r < rows) & inside
    b_next = tl.load(p_x + o_r * stride_xr * UNIT, mask=mask, other=0.0)
    b_dnext = tl.load(p_dy + o_r * stride_yr * UNIT, mask=mask, other=0.0)
    if weight is not None:
        b_w = tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        b_b = tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    if sums is not None:
        # Of each row of a tile, so that warps are heard of one another once.
        b_dw = tl.zeros((BLOCK, PIECES, PIECE), ACC)
        b_db = tl.zeros((BLOCK, PIECES, PIECE), ACC)
    for first in range(start, rows, step):
        # The next rows are on their way while these are differentiated.
        b_h, b_dz, o_r = b_next.to(ACC), b_dnext.to(ACC), first + step + o_b
        mask = (o_r < rows) & inside
        b_next = tl.load(p_x + o_r * stride_xr * UNIT, mask=mask, other=0.0)
        b_dnext = tl.load(p_dy + o_r * stride_yr * UNIT, mask=mask, other=0.0)
        o_r = first + o_b
        b_h = tl.where(inside, b_h - row_sums(b_h) / D, 0.0)
        b_r = 1.0 / tl.sqrt(row_sums(b_h * b_h) / D + tl.full((), eps, ACC))
        # There is no deviation of rows that are not there, for an eps of 0.
        b_r = tl.where(o_r < rows, b_r, 0.0)
        b_h *= b_r
        if bias is not None:
            b_z = b_h * b_w + b_b
            b_dz = tl.where(b_z > 0, b_dz, b_dz * tl.full((), slope, ACC))
        if sums is not None:
            b_dw += b_dz * b_h
            b_db += b_dz
        if dx is not None:
            if weight is not None:
                b_dz *= b_w
            b_dx = b_dz - row_sums(b_dz) / D - b_h * (row_sums(b_dz * b_h) / D)
            p_dx = dx + (i_p * rows + o_r) * D + o_d
            tl.store(p_dx, (b_dx * b_r).to(dx.dtype.element_ty), mask=(o_r < rows) & inside)
    if sums is not None:
        p_sums = sums + (i_p * tl.num_programs(0) + i_b) * (2 * D) + o_d
        tl.store(p_sums, tl.sum(b_dw, 0, keep_dims=True), mask=inside)
        tl.store(p_sums + D, tl.sum(b_db, 0, keep_dims=True), mask=inside)


@lru_cache(maxsize=1024)
def plan_grad_norm(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dy_stride: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
    slope: float,
) -> tuple[Launch, Launch]:
    """The launches of the kernel and of that which adds up its sums.

    others: dtypes of dy, weight, bias, dx, dw and db, which they are compiled for as well.
    """
    P, R, D = shape
    dtype_y, *_, dtype_w, dtype_b = others
    assert dtype_y is not None
    acc: Any = Tiling.acc(dtype)
    width, itemsize = triton.next_power_of_2(D), acc.primitive_bitwidth // 8
    elements, warps = WARP // itemsize, 4
    if width <= NARROW // itemsize:
        # Rows of its own for each warp, whose sums need no barrier, cut into what it has of one.
        # The longest take too many registers for that, and are two warps' each.
        block = warps * elements // width
        piece = min(width, 256)
    else:
        block, piece = max(1, ELEMENTS // width), width
    tiles = triton.cdiv(R, block)
    # As many as a multiprocessor has registers for, of all sets of rows together.
    programs = 4 * MULTIPROCESSORS
    if dtype_w is not None or dtype_b is not None:
        long = elements < width <= NARROW // itemsize
        short = dtype.itemsize == dtype_y.itemsize == 2
        each = 2 if long else 4 if short and width == D else 3
        programs = min(each * MULTIPROCESSORS, max(MULTIPROCESSORS, tiles * P // TILES))
    programs = min(tiles, max(1, programs // P))
    narrowest = min((dtype, dtype_y), key=lambda kind: kind.itemsize)
    unit, steps = in_units(shape, narrowest, stride, dy_stride)
    return Launch(
        grad_norm_kernel,
        (programs, P),
        (*steps, R, eps, slope),
        {
            "D": D,
            "PIECES": width // piece,
            "BLOCK": block,
            "PIECE": piece,
            "UNIT": unit,
            "ACC": acc,
        },
        # Several threads make one sum over rows, which has to be the same in all of them: see norms
        # in docs/kernels.md.
        {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False},
    ), plan_add_up(D, P * D, programs, 1, acc, (dtype_w, dtype_b))


@lru_cache(maxsize=1024)
def plan_grad_layer_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
) -> tuple[Launch, Launch]:
    """For contiguous x and dy `(..., D)`, without an activation."""
    D = shape[-1]
    stride = (0, D, 1)
    rows = (1, math.prod(shape[:-1]), D)
    return plan_grad_norm(rows, stride, stride, dtype, others, eps, 1.0)


def run(
    plan: tuple[Launch, Launch],
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *gradients: torch.Tensor | None,
) -> None:
    """Fill the gradients of x, weight and bias; those that are None are left out."""
    launch, add_up = plan
    dx, dw, db = gradients
    if dw is None and db is None:
        launch(x, dy, weight, bias, dx, None)
        return
    programs, P, _ = launch.grid
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty((P, programs, 2, launch.constants["D"]), dtype=wide)
    launch(x, dy, weight, bias, dx, sums)
    add_up(sums, dw, db)


def launch_grad_norm(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias. The last dim of x and dy is contiguous."""
    gradients = (x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias))
    others = dtypes_of(dy, weight, bias, *gradients)
    plan = plan_grad_norm(tuple(x.shape), x.stride(), dy.stride(), x.dtype, others, eps, slope)
    run(plan, x, dy, weight, bias, *gradients)
    return gradients

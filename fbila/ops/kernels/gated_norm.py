"""A sum of tokens, its LayerNorm and a gate in one pass, and their gradients in another.

    a = x + s v,    h = (a - mean) r,    n = h w + b,    y = n g
    dg = dy n,  da = r (w dn - mean(w dn) - h mean(w dn h)) with dn = dy g,  dx = da,  dv = s da
    dw = sum dn h,  db = sum dn,  ds = sum da v

x, v, g `(R, D)`, each with a stride of its own -> y, contiguous. s `(heads,)` is one number for all
channels of a head, w and b are `(D,)`. The sums are those of each program, `(programs, 3, D)`, of
dw, ds channel by channel, and db, which `add_up.py` adds up. Rows are those that one warp holds:
see `norm.py` and `norm_backward.py`, of which tiles and warps are.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..memory_format import dtypes_of
from .add_up import plan_add_up
from .launch import Launch, kernel
from .norm import in_units
from .norm_backward import MULTIPROCESSORS, NARROW, TILES, WARP, row_sums
from .norm_kernels import normalized
from .tiling import Tiling


@triton.jit
def load_rows(p, o_r, stride, rows, inside):
    return tl.load(p + o_r * stride, mask=(o_r < rows) & inside, other=0.0)


@kernel
def gated_norm_kernel(
    x, v, gate, scale, weight, bias, y,
    stride_x: "i64", stride_v: "i64", stride_g: "i64", rows: "i64", eps: "fp64",
    D: tl.constexpr, HEAD: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0) * BLOCK
    o_b = tl.arange(0, BLOCK)[None, :, None]
    o_d = (tl.arange(0, PIECES) * PIECE)[:, None, None] + tl.arange(0, PIECE)[None, None, :]
    inside = o_d < D
    o_r = start + o_b
    b_next = load_rows(x + o_d, o_r, stride_x * UNIT, rows, inside)
    b_vnext = load_rows(v + o_d, o_r, stride_v * UNIT, rows, inside)
    b_gnext = load_rows(gate + o_d, o_r, stride_g * UNIT, rows, inside)
    b_s = tl.load(scale + o_d // HEAD, mask=inside, other=0.0).to(ACC)
    b_w = tl.load(weight + o_d, mask=inside, other=0.0).to(ACC)
    b_b = tl.load(bias + o_d, mask=inside, other=0.0).to(ACC)
    for first in range(start, rows, step):
        # The next rows are on their way while these are normalised.
        b_a, b_g = b_next.to(ACC) + b_s * b_vnext.to(ACC), b_gnext.to(ACC)
        o_r = first + step + o_b
        b_next = load_rows(x + o_d, o_r, stride_x * UNIT, rows, inside)
        b_vnext = load_rows(v + o_d, o_r, stride_v * UNIT, rows, inside)
        b_gnext = load_rows(gate + o_d, o_r, stride_g * UNIT, rows, inside)
        b_y = (normalized(b_a, inside, eps, D, True, ACC) * b_w + b_b) * b_g
        o_r = first + o_b
        tl.store(y + o_r * D + o_d, b_y.to(y.dtype.element_ty), mask=(o_r < rows) & inside)


@kernel
def grad_gated_norm_kernel(
    x, v, gate, scale, weight, bias, dy, dx, dv, dgate, sums,
    stride_x: "i64", stride_v: "i64", stride_g: "i64", stride_y: "i64", rows: "i64", eps: "fp64",
    D: tl.constexpr, HEAD: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    start, step = i_b * BLOCK, tl.num_programs(0) * BLOCK
    o_b = tl.arange(0, BLOCK)[:, None, None]
    o_d = (tl.arange(0, PIECES) * PIECE)[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    inside = o_d < D
    b_s = tl.load(scale + o_d // HEAD, mask=inside, other=0.0).to(ACC)
    b_w = tl.load(weight + o_d, mask=inside, other=0.0).to(ACC)
    b_b = tl.load(bias + o_d, mask=inside, other=0.0).to(ACC)
    # Of each row of a tile, so that warps hear of one another once.
    b_dw = tl.zeros((BLOCK, PIECES, PIECE), ACC)
    b_ds = tl.zeros((BLOCK, PIECES, PIECE), ACC)
    b_db = tl.zeros((BLOCK, PIECES, PIECE), ACC)
    for first in range(start, rows, step):
        o_r = first + o_b
        mask = (o_r < rows) & inside
        b_h = load_rows(x + o_d, o_r, stride_x * UNIT, rows, inside).to(ACC)
        b_v = load_rows(v + o_d, o_r, stride_v * UNIT, rows, inside).to(ACC)
        b_g = load_rows(gate + o_d, o_r, stride_g * UNIT, rows, inside).to(ACC)
        b_dy = load_rows(dy + o_d, o_r, stride_y * UNIT, rows, inside).to(ACC)
        b_h += b_s * b_v
        b_h = tl.where(inside, b_h - row_sums(b_h) / D, 0.0)
        b_r = 1.0 / tl.sqrt(row_sums(b_h * b_h) / D + tl.full((), eps, ACC))
        # There is no deviation of rows that are not there, for an eps of 0.
        b_r = tl.where(o_r < rows, b_r, 0.0)
        b_h *= b_r
        p_r = o_r * D + o_d
        b_dg = b_dy * (b_h * b_w + b_b)
        tl.store(dgate + p_r, b_dg.to(dgate.dtype.element_ty), mask=mask)
        b_dn = b_dy * b_g
        b_dw += b_dn * b_h
        b_db += b_dn
        b_dn *= b_w
        b_da = b_dn - row_sums(b_dn) / D - b_h * (row_sums(b_dn * b_h) / D)
        b_da *= b_r
        b_ds += b_da * b_v
        tl.store(dx + p_r, b_da.to(dx.dtype.element_ty), mask=mask)
        tl.store(dv + p_r, (b_s * b_da).to(dv.dtype.element_ty), mask=mask)
    p_sums = sums + i_b * (3 * D) + o_d
    tl.store(p_sums, tl.sum(b_dw, 0, keep_dims=True), mask=inside)
    tl.store(p_sums + D, tl.sum(b_ds, 0, keep_dims=True), mask=inside)
    tl.store(p_sums + 2 * D, tl.sum(b_db, 0, keep_dims=True), mask=inside)


def fits(width: int, dtype: torch.dtype) -> bool:
    """Whether a warp holds rows of x of that width."""
    itemsize = 8 if dtype == torch.float64 else 4
    return triton.next_power_of_2(width) <= NARROW // itemsize


@lru_cache(maxsize=1024)
def plan_gated_norm(
    shape: tuple[int, int],
    heads: int,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    eps: float,
) -> Launch:
    """strides: of rows of x, v and g, and of dy for the gradients. dtypes: of all tensors, first x,
    v, g and, for the gradients, dy.
    """
    R, D = shape
    backward = len(strides) == 4
    acc: Any = Tiling.acc(dtypes[0])
    width, elements = triton.next_power_of_2(D), WARP // (acc.primitive_bitwidth // 8)
    # Of the longest rows two warps have one for the gradients, which take most registers.
    warps = 4 if backward else 1
    block = max(1, warps * elements // width)
    tiles = triton.cdiv(R, block)
    # As many as a multiprocessor has registers for.
    if backward:
        programs = min(2 * MULTIPROCESSORS, max(MULTIPROCESSORS, tiles // TILES))
    else:
        programs = (8 if width > elements else 12) * MULTIPROCESSORS
    narrowest = min(dtypes[: len(strides)], key=lambda kind: kind.itemsize)
    unit, steps = in_units((1, R), narrowest, *[(0, stride) for stride in strides])
    piece = min(width, 256)
    return Launch(
        grad_gated_norm_kernel if backward else gated_norm_kernel,
        (min(tiles, programs), 1),
        (*steps[1::2], R, eps),
        {
            "D": D,
            "HEAD": D // heads,
            "PIECES": width // piece,
            "BLOCK": block,
            "PIECE": piece,
            "UNIT": unit,
            "ACC": acc,
        },
        # As in `norm_backward.py`.
        {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": not backward},
    )


def add_up(sums: torch.Tensor, of_channels: torch.Tensor, dbias: torch.Tensor) -> None:
    """dw and, channel by channel, ds into `(D, 2)`, and db."""
    parts, _, D = sums.shape
    acc = tl.float64 if sums.dtype == torch.float64 else tl.float32
    others = dtypes_of(of_channels, dbias)
    plan_add_up(D, D, parts, 2, acc, others)(sums, of_channels, dbias)

"""The gradient of LayerNorm with LeakyReLU in one pass over x and the gradient of the output.

    h = (x - mean) r,  z = h w + b,  dz = dy (1 where z > 0, slope elsewhere)
    dx = r (w dz - mean(w dz) - h mean(w dz h))        dw = sum dz h        db = sum dz

x, dy `(P, R, D)` -> dx `(P, R, D)` contiguous, and dw and db `(P, D)`. The statistics of a row are
found again; sums over rows are added up program by program, in the same order every time.

Without `sums` it is dx of LayerNorm alone: no activation, and weight may be None for 1.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..memory_format import dtypes_of
from .launch import Launch, kernel
from .norm import ELEMENTS, in_units
from .tiling import Tiling

# For all sets of rows together: enough for every multiprocessor, few enough to add up.
_PROGRAMS = 512


@kernel
def grad_norm_kernel(
    x, dy, weight, bias, dx, sums,
    stride_xp: "i64", stride_xr: "i64", stride_yp: "i64", stride_yr: "i64", rows: "i64",
    eps: "fp64", slope: "fp64",
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    o_d = tl.arange(0, WIDTH)
    inside = o_d < D
    if weight is not None:
        b_w = tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    if sums is not None:
        b_b = tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
        b_dw = tl.zeros((WIDTH,), ACC)
        b_db = tl.zeros((WIDTH,), ACC)
    for first in range(i_b * BLOCK, rows, programs * BLOCK):
        o_r = first + tl.arange(0, BLOCK)
        mask = (o_r < rows)[:, None] & inside[None, :]
        p_x = x + i_p * (stride_xp * UNIT) + o_r[:, None] * (stride_xr * UNIT) + o_d[None, :]
        p_dy = dy + i_p * (stride_yp * UNIT) + o_r[:, None] * (stride_yr * UNIT) + o_d[None, :]
        b_h = tl.load(p_x, mask=mask, other=0.0).to(ACC)
        b_dz = tl.load(p_dy, mask=mask, other=0.0).to(ACC)
        b_h -= (tl.sum(b_h, 1) / D)[:, None]
        b_h = tl.where(inside[None, :], b_h, 0.0)
        b_r = 1.0 / tl.sqrt(tl.sum(b_h * b_h, 1) / D + tl.full((), eps, ACC))
        b_h *= b_r[:, None]
        if sums is not None:
            b_z = b_h * b_w[None, :] + b_b[None, :]
            b_dz = tl.where(b_z > 0, b_dz, b_dz * tl.full((), slope, ACC))
            b_dw += tl.sum(b_dz * b_h, 0)
            b_db += tl.sum(b_dz, 0)
        if weight is not None:
            b_dz *= b_w[None, :]
        b_dx = b_dz - (tl.sum(b_dz, 1) / D)[:, None] - b_h * (tl.sum(b_dz * b_h, 1) / D)[:, None]
        p_dx = dx + (i_p * rows + o_r[:, None]) * D + o_d[None, :]
        tl.store(p_dx, (b_dx * b_r[:, None]).to(dx.dtype.element_ty), mask=mask)
    if sums is not None:
        p_sums = sums + (i_p * programs + i_b) * D + o_d
        tl.store(p_sums, b_dw, mask=inside)
        tl.store(p_sums + tl.num_programs(1) * programs * D, b_db, mask=inside)


@lru_cache(maxsize=1024)
def plan_grad_norm(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dy_stride: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
    slope: float,
) -> Launch:
    """others: dtypes of dy, weight and bias, which the kernel is compiled for as well."""
    P, R, D = shape
    width = triton.next_power_of_2(D)
    block = max(1, ELEMENTS // width)
    programs = min(triton.cdiv(R, block), max(1, _PROGRAMS // P))
    narrowest = min((dtype, others[0]), key=lambda kind: kind.itemsize)
    unit, steps = in_units(shape, narrowest, stride, dy_stride)
    return Launch(
        grad_norm_kernel,
        (programs, P),
        (*steps, R, eps, slope),
        {"D": D, "WIDTH": width, "BLOCK": block, "UNIT": unit, "ACC": Tiling.acc(dtype)},
        # Several threads make one sum over rows, which has to be the same in all of them: see norms
        # in docs/kernels.md.
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
    )


def launch_grad_norm(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and dw and db as `(2, P, D)`. The last dim of x and dy is contiguous."""
    P, _, D = x.shape
    others = dtypes_of(dy, weight, bias)
    launch = plan_grad_norm(tuple(x.shape), x.stride(), dy.stride(), x.dtype, others, eps, slope)
    dx = x.new_empty(x.shape)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty((2, P, launch.grid[0], D), dtype=wide)
    launch(x, dy, weight, bias, dx, sums)
    return dx, sums.sum(2).to(weight.dtype)


@lru_cache(maxsize=1024)
def plan_grad_layer_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    eps: float,
) -> Launch:
    """dx alone, for contiguous x and dy `(..., D)`, without bias, activation and sums."""
    D = shape[-1]
    stride = (0, D, 1)
    rows = (1, math.prod(shape[:-1]), D)
    return plan_grad_norm(rows, stride, stride, dtype, others, eps, 1.0)

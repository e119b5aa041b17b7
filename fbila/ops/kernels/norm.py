"""LayerNorm and LeakyReLU in one pass, for several sets of rows that have weights of their own.

x `(P, R, D)` -> o `(P, R, D)` contiguous, with weight and bias `(P, D)`.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile: 16 for each of 128 threads.
ELEMENTS = 2048


@kernel
def norm_kernel(
    x, weight, bias, o,
    stride_xp: "i64", stride_xr: "i64", rows: "i64", eps: "fp64", slope: "fp64",
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, WIDTH)
    inside = o_d < D
    mask = (o_r < rows)[:, None] & inside[None, :]
    b_x = tl.load(
        x + i_p * stride_xp + o_r[:, None] * stride_xr + o_d[None, :], mask=mask, other=0.0
    )
    b_x = b_x.to(ACC)
    b_x -= (tl.sum(b_x, 1) / D)[:, None]
    b_x = tl.where(inside[None, :], b_x, 0.0)
    variance = tl.sum(b_x * b_x, 1) / D
    b_x *= (1.0 / tl.sqrt(variance + tl.full((), eps, ACC)))[:, None]
    b_w = tl.load(weight + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    b_b = tl.load(bias + i_p * D + o_d, mask=inside, other=0.0).to(ACC)
    b_x = b_x * b_w[None, :] + b_b[None, :]
    b_x = tl.where(b_x < 0, b_x * tl.full((), slope, ACC), b_x)
    p_o = o + (i_p * rows + o_r[:, None]) * D + o_d[None, :]
    tl.store(p_o, b_x.to(o.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_norm(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, eps: float, slope: float
) -> Launch:
    P, R, D = shape
    width = triton.next_power_of_2(D)
    block = max(1, ELEMENTS // width)
    return Launch(
        norm_kernel,
        (triton.cdiv(R, block), P),
        (stride[0], stride[1], R, eps, slope),
        {"D": D, "WIDTH": width, "BLOCK": block, "ACC": Tiling.acc(dtype)},
        {"num_warps": 4, "num_stages": 1},
    )


def launch_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float
) -> torch.Tensor:
    """The head dim of x is contiguous, weight and bias are."""
    o = x.new_empty(x.shape)
    plan_norm(tuple(x.shape), x.stride(), x.dtype, eps, slope)(x, weight, bias, o)
    return o

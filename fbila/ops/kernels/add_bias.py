"""y = x + residual + x_bias + residual_bias: what ends a residual block, in one pass.

x and residual `(B, C, ...)`, each NCHW or channels_last, the biases `(C,)`; y lies in memory as
residual does. The two may differ in dtype, and y is in the wider one. It is rounded once.
"""

from functools import lru_cache

import torch
import triton.language as tl

from .channels import Planes, inside, sample_offset, tile_offset, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile.
ELEMENTS = 4096


@kernel
def add_bias_kernel(
    x, residual, x_bias, residual_bias, y,
    channels: "i64", positions: "i64", c_blocks: "i32", p_blocks: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, LAST_X: tl.constexpr, LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_c, i = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    i_p, i_b = (i % p_blocks).to(tl.int64), (i // p_blocks).to(tl.int64)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = inside(o_c, channels, UNIT_C)
    mask = m_c[:, None] & inside(o_p, positions, UNIT_P)[None, :]
    sample = sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    o_y = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
    o_x = o_y
    if LAST_X != LAST:
        o_x = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST_X)
    b_x = tl.load(x + sample + o_x, mask=mask, other=0.0).to(ACC)
    b_r = tl.load(residual + sample + o_y, mask=mask, other=0.0).to(ACC)
    if x_bias is not None:
        b_x += tl.load(x_bias + o_c, mask=m_c, other=0.0).to(ACC)[:, None]
    if residual_bias is not None:
        b_r += tl.load(residual_bias + o_c, mask=m_c, other=0.0).to(ACC)[:, None]
    tl.store(y + sample + o_y, (b_x + b_r).to(y.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_add_bias(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    bias_dtypes: tuple[torch.dtype | None, ...],
    last_x: bool,
    last: bool,
) -> Launch:
    """dtypes: of x, residual and y. bias_dtypes: what the kernel is compiled for as well."""
    planes = Planes.of(shape, *dtypes)
    block_c, block_p = planes.tile(ELEMENTS, last_x, last)
    c_blocks, p_blocks = planes.blocks(block_c, block_p)
    return Launch(
        add_bias_kernel,
        (planes.samples * p_blocks * c_blocks, 1),
        (*planes.numbers, c_blocks, p_blocks),
        {
            **planes.units,
            "LAST_X": last_x,
            "LAST": last,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "ACC": Tiling.acc(dtypes[-1]),
        },
        {"num_warps": warps(block_c * block_p), "num_stages": 1},
    )

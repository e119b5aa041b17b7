"""The gradient of GroupNorm with SiLU by its input, in three launches: see `group_norm.py`.

    h = (z - mean) r,    u = w h + b,    g = w dy [SiLU'(u)],    dx = r (g - mean(g) - h mean(g h))

z is x and what is added to it, and means are over a group: the mean and r of each are given. x and
dy `(B, C, ...)` may each be NCHW or channels_last, and dx lies in memory as x does.

`group_grad_parts_kernel` splits positions as the forward pass does, and adds up g and g h over each
part of each channel; `group_grad_merge_kernel` adds up parts and channels, in the same order every
time; `group_grad_apply_kernel` goes over x and dy again.
"""

import torch
import triton
import triton.language as tl

from . import group_norm
from .channels import Planes, inside, sample_offset, tile_offset, warps
from .group_norm import added
from .launch import Launch, kernel
from .tiling import Tiling

# Parts that are merged at a time.
PARTS = 1024


@triton.jit
def grad_terms(b_z, b_dy, b_mean, b_r, b_w, b_b, SILU: tl.constexpr):
    """h, and g, which is the gradient by h."""
    b_h = (b_z - b_mean) * b_r
    b_g = b_dy * b_w
    if SILU:
        b_u = b_h * b_w + b_b
        b_s = 1.0 / (1.0 + tl.exp(-b_u))
        b_g *= b_s * (1.0 + b_u * (1.0 - b_s))
    return b_h, b_g


@triton.jit
def of_channels(
    shift, x_bias, weight, bias, statistics, i_b, o_c, m_c, all_groups, groups, group_channels,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean without what is added, r, w and b of the channels o_c, columns, and their groups."""
    o_g = i_b * groups + o_c // group_channels
    row = i_b * groups * group_channels
    b_mean = tl.load(statistics + o_g, mask=m_c, other=0.0)
    b_mean -= added(shift, x_bias, row, o_c, m_c, ACC)
    b_r = tl.load(statistics + all_groups + o_g, mask=m_c, other=0.0)
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC)
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)
    return b_mean[:, None], b_r[:, None], b_w[:, None], b_b[:, None], o_g


@kernel
def group_grad_parts_kernel(
    x, dy, shift, x_bias, weight, bias, statistics, scratch,
    channels: "i64", positions: "i64", all_parts: "i64", all_groups: "i64",
    groups: "i32", group_channels: "i32", c_blocks: "i32", parts: "i32", tiles: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, LAST: tl.constexpr, LAST_Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_c, i = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    i_part, i_b = (i % parts).to(tl.int64), (i // parts).to(tl.int64)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = inside(o_c, channels, UNIT_C)
    first = i_part * tiles * BLOCK_P
    sample = sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    b_mean, b_r, b_w, b_b, _ = of_channels(
        shift, x_bias, weight, bias, statistics, i_b, o_c, m_c, all_groups, groups, group_channels,
        ACC,
    )  # fmt: skip
    b_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    b_dot = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    for i_t in range(0, tiles):
        o_p = first + i_t * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = m_c[:, None] & inside(o_p, positions, UNIT_P)[None, :]
        o_x = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
        o_y = o_x
        if LAST != LAST_Y:
            o_y = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST_Y)
        b_x = tl.load(x + sample + o_x, mask=mask, other=0.0).to(ACC)
        b_dy = tl.load(dy + sample + o_y, mask=mask, other=0.0).to(ACC)
        b_h, b_g = grad_terms(b_x, b_dy, b_mean, b_r, b_w, b_b, SILU)
        b_sum += b_g
        b_dot += b_g * b_h
    p_part = scratch + (i_b * (channels * UNIT_C) + o_c) * parts + i_part
    tl.store(p_part, tl.sum(b_sum, 1), mask=m_c)
    tl.store(p_part + all_parts, tl.sum(b_dot, 1), mask=m_c)


@kernel
def group_grad_merge_kernel(
    scratch,
    all_parts: "i64", all_groups: "i64", positions: "i64", group_channels: "i32", parts: "i32",
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0).to(tl.int64)
    parts_of_group = group_channels * parts
    p_part = scratch + i_g * parts_of_group
    b_sum = tl.zeros((BLOCK,), dtype=ACC)
    b_dot = tl.zeros((BLOCK,), dtype=ACC)
    for i in range(0, parts_of_group, BLOCK):
        o = i + tl.arange(0, BLOCK)
        mask = o < parts_of_group
        b_sum += tl.load(p_part + o, mask=mask, other=0.0)
        b_dot += tl.load(p_part + all_parts + o, mask=mask, other=0.0)
    whole = 1.0 / (tl.cast(positions, ACC) * group_channels)
    p_group = scratch + 2 * all_parts + i_g
    tl.store(p_group, tl.sum(b_sum, 0) * whole)
    tl.store(p_group + all_groups, tl.sum(b_dot, 0) * whole)


@kernel
def group_grad_apply_kernel(
    x, dy, shift, x_bias, weight, bias, statistics, scratch, dx,
    channels: "i64", positions: "i64", all_parts: "i64", all_groups: "i64",
    groups: "i32", group_channels: "i32", c_blocks: "i32", p_blocks: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, LAST: tl.constexpr, LAST_Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_c, i = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    i_p, i_b = (i % p_blocks).to(tl.int64), (i // p_blocks).to(tl.int64)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = inside(o_c, channels, UNIT_C)
    mask = m_c[:, None] & inside(o_p, positions, UNIT_P)[None, :]
    sample = sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    b_mean, b_r, b_w, b_b, o_g = of_channels(
        shift, x_bias, weight, bias, statistics, i_b, o_c, m_c, all_groups, groups, group_channels,
        ACC,
    )  # fmt: skip
    p_group = scratch + 2 * all_parts + o_g
    b_sum = tl.load(p_group, mask=m_c, other=0.0)[:, None]
    b_dot = tl.load(p_group + all_groups, mask=m_c, other=0.0)[:, None]
    o_x = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
    o_y = o_x
    if LAST != LAST_Y:
        o_y = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST_Y)
    b_x = tl.load(x + sample + o_x, mask=mask, other=0.0).to(ACC)
    b_dy = tl.load(dy + sample + o_y, mask=mask, other=0.0).to(ACC)
    b_h, b_g = grad_terms(b_x, b_dy, b_mean, b_r, b_w, b_b, SILU)
    b_dx = (b_g - b_sum - b_h * b_dot) * b_r
    tl.store(dx + sample + o_x, b_dx.to(dx.dtype.element_ty), mask=mask)


class GroupNormBackward:
    """The three launches for tensors of one shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        dtype_y: torch.dtype,
        last: bool,
        last_y: bool,
        groups: int,
        silu: bool,
    ) -> None:
        planes = Planes.of(shape, dtype, dtype_y)
        acc = Tiling.acc(dtype)
        rows, all_groups = planes.samples * planes.channels, planes.samples * groups
        of_group = (groups, planes.channels // groups)
        block_c, block_p = planes.tile(group_norm.STATISTICS, last, last_y)
        c_blocks, parts, tiles = group_norm.split(planes, block_c, block_p)
        all_parts = rows * parts
        self.scratch = 2 * all_parts + 2 * all_groups
        constants = {**planes.units, "LAST": last, "LAST_Y": last_y}
        self.parts = Launch(
            group_grad_parts_kernel,
            (planes.samples * parts * c_blocks, 1),
            (*planes.numbers, all_parts, all_groups, *of_group, c_blocks, parts, tiles),
            {**constants, "BLOCK_C": block_c, "BLOCK_P": block_p, "SILU": silu, "ACC": acc},
            # As in the forward pass: several threads make one sum.
            {"num_warps": warps(block_c * block_p), "num_stages": 1, "enable_fp_fusion": False},
        )
        self.merge = Launch(
            group_grad_merge_kernel,
            (all_groups, 1),
            (all_parts, all_groups, planes.positions, of_group[1], parts),
            {"BLOCK": PARTS, "ACC": acc},
            {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
        )
        block_c, block_p = planes.tile(group_norm.APPLY, last, last_y)
        c_blocks, p_blocks = planes.blocks(block_c, block_p)
        self.apply = Launch(
            group_grad_apply_kernel,
            (planes.samples * p_blocks * c_blocks, 1),
            (*planes.numbers, all_parts, all_groups, *of_group, c_blocks, p_blocks),
            {**constants, "BLOCK_C": block_c, "BLOCK_P": block_p, "SILU": silu, "ACC": acc},
            {"num_warps": warps(block_c * block_p), "num_stages": 1},
        )

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor | None) -> None:
        """tensors: dy, shift, x_bias, weight, bias, statistics and dx."""
        *others, dx = tensors
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scratch = x.new_empty(self.scratch, dtype=wide)
        self.parts(x, *others, scratch)
        self.merge(scratch)
        self.apply(x, *others, scratch, dx)

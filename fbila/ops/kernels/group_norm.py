"""GroupNorm of x `(B, C, ...)` with what is added before it and SiLU behind it, in three launches.

    y = [SiLU]((z - mean) / sqrt(variance + eps) * weight + bias),    z = x + shift + x_bias

Mean and variance are over the C / groups channels of a group and all positions.

`group_statistics_kernel` splits positions over enough programs for the largest GPU and writes each
part's mean and sum of squares about it, channel by channel; what is added to a channel moves its
mean alone. `group_merge_kernel` makes those of a group one, by two passes over the parts: squares
are taken about means throughout, so that nothing cancels. `group_apply_kernel` goes over x again.
"""

import torch
import triton
import triton.language as tl

from .channels import Planes, inside, sample_offset, tile_offset, warps
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile.
STATISTICS, APPLY = 2048, 4096
# Programs that each sample is split over, where it is large. The size of the batch must not enter.
PROGRAMS = 512
# Parts that are merged at a time, at most.
PARTS = 4096


@triton.jit
def normalized(b_x, mean, scale, bias, SILU: tl.constexpr):
    b_y = (b_x - mean) * scale + bias
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    return b_y


@triton.jit
def added(shift, x_bias, row, o_c, mask, ACC: tl.constexpr):
    """What is added to the channels o_c of the sample whose first channel is `row` of all."""
    b_shift = tl.zeros(o_c.shape, dtype=ACC)
    if shift is not None:
        b_shift += tl.load(shift + row + o_c, mask=mask, other=0.0).to(ACC)
    if x_bias is not None:
        b_shift += tl.load(x_bias + o_c, mask=mask, other=0.0).to(ACC)
    return b_shift


@kernel
def group_statistics_kernel(
    x, scratch,
    channels: "i64", positions: "i64", all_parts: "i64",
    c_blocks: "i32", parts: "i32", tiles: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_c, i = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    i_part, i_b = (i % parts).to(tl.int64), (i // parts).to(tl.int64)
    o_c = i_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = inside(o_c, channels, UNIT_C)
    first = i_part * tiles * BLOCK_P
    x += sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    # A mean and a sum of squares for each place of the tile, by Welford's recurrence.
    b_mean = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    b_m2 = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    seen = tl.full((), 0.0, ACC)
    end = first + tiles * BLOCK_P
    o_p = first + tl.arange(0, BLOCK_P)
    mask = m_c[:, None] & inside(o_p, positions, UNIT_P)[None, :]
    p_x = x + tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
    b_next = tl.load(p_x, mask=mask, other=0.0)
    for _ in range(0, tiles):
        # The next tile is on its way while this one is added.
        b_x, m_x = b_next.to(ACC), mask
        o_p += BLOCK_P
        mask = m_c[:, None] & (inside(o_p, positions, UNIT_P) & (o_p < end))[None, :]
        p_x = x + tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
        b_next = tl.load(p_x, mask=mask, other=0.0)
        b_d = tl.where(m_x, b_x - b_mean, 0.0)
        seen += 1.0
        b_mean = tl.fma(b_d, tl.zeros_like(b_d) + 1.0 / seen, b_mean)
        b_m2 = tl.fma(b_d, b_x - b_mean, b_m2)
    # How many elements each place has seen.
    left = positions * UNIT_P - first - tl.arange(0, BLOCK_P)
    c_n = tl.minimum(tl.maximum((left + BLOCK_P - 1) // BLOCK_P, 0), tiles).to(ACC)[None, :]
    c_mean = tl.sum(b_mean * c_n, 1) / tl.sum(c_n, 1)
    b_d = b_mean - c_mean[:, None]
    c_m2 = tl.sum(b_m2 + b_d * b_d * c_n, 1)
    p_part = scratch + (i_b * (channels * UNIT_C) + o_c) * parts + i_part
    tl.store(p_part, c_mean, mask=m_c)
    tl.store(p_part + all_parts, c_m2, mask=m_c)


@triton.jit
def load_parts(
    p_part, shift, x_bias, row, first, i, all_parts, positions, part, group_channels, parts,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of a group's parts from i on: mean, sum of squares, share, and whether there is one."""
    o = i + tl.arange(0, BLOCK)
    mask = o < group_channels * parts
    # In parts of the whole, which is not a sum that could grow large.
    whole = 1.0 / (tl.cast(positions, ACC) * group_channels)
    share = tl.minimum(positions - (o % parts) * part, part).to(ACC) * whole
    b_z = added(shift, x_bias, row, first + o // parts, mask, ACC)
    b_z += tl.load(p_part + o, mask=mask, other=0.0)
    b_m2 = tl.load(p_part + all_parts + o, mask=mask, other=0.0) * whole
    return b_z, b_m2, share, mask


@kernel
def group_merge_kernel(
    scratch, shift, x_bias, weight, statistics,
    all_parts: "i64", rows: "i64", positions: "i64", part: "i64", eps: "fp64",
    groups: "i32", group_channels: "i32", parts: "i32",
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_g, i_b = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    row = i_b * groups * group_channels
    first = i_g * group_channels
    parts_of_group = group_channels * parts
    p_part = scratch + (row + first) * parts
    # The first block, seldom not of all parts, is kept from one pass to the other.
    b_z, b_m2, share, mask = load_parts(
        p_part, shift, x_bias, row, first, 0, all_parts, positions, part, group_channels, parts,
        BLOCK, ACC,
    )  # fmt: skip
    b_mean = tl.where(mask, b_z * share, 0.0)
    for i in range(BLOCK, parts_of_group, BLOCK):
        c_z, _, c_share, c_mask = load_parts(
            p_part, shift, x_bias, row, first, i, all_parts, positions, part, group_channels, parts,
            BLOCK, ACC,
        )  # fmt: skip
        b_mean += tl.where(c_mask, c_z * c_share, 0.0)
    mean = tl.sum(b_mean, 0)
    b_d = b_z - mean
    b_variance = tl.where(mask, b_m2 + b_d * b_d * share, 0.0)
    for i in range(BLOCK, parts_of_group, BLOCK):
        c_z, c_m2, c_share, c_mask = load_parts(
            p_part, shift, x_bias, row, first, i, all_parts, positions, part, group_channels, parts,
            BLOCK, ACC,
        )  # fmt: skip
        c_d = c_z - mean
        b_variance += tl.where(c_mask, c_m2 + c_d * c_d * c_share, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(b_variance, 0) + tl.full((), eps, ACC))
    if statistics is not None:
        tl.store(statistics + tl.program_id(0), mean)
        tl.store(statistics + tl.num_programs(0) + tl.program_id(0), inverse)
    p_channel = scratch + 2 * all_parts + row
    for i in range(0, group_channels, BLOCK):
        o = i + tl.arange(0, BLOCK)
        mask = o < group_channels
        o_c = first + o
        b_w = tl.load(weight + o_c, mask=mask, other=0.0).to(ACC)
        tl.store(p_channel + o_c, mean - added(shift, x_bias, row, o_c, mask, ACC), mask=mask)
        tl.store(p_channel + rows + o_c, inverse * b_w, mask=mask)


@kernel
def group_apply_kernel(
    x, scratch, bias, y,
    channels: "i64", positions: "i64", all_parts: "i64", rows: "i64",
    c_blocks: "i32", p_blocks: "i32",
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
    o_x = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
    b_x = tl.load(x + sample + o_x, mask=mask, other=0.0).to(ACC)
    p_channel = scratch + 2 * all_parts + i_b * (channels * UNIT_C) + o_c
    b_mean = tl.load(p_channel, mask=m_c, other=0.0)[:, None]
    b_scale = tl.load(p_channel + rows, mask=m_c, other=0.0)[:, None]
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)[:, None]
    b_y = normalized(b_x, b_mean, b_scale, b_bias, SILU)
    o_y = o_x
    if LAST != LAST_Y:
        o_y = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST_Y)
    tl.store(y + sample + o_y, b_y.to(y.dtype.element_ty), mask=mask)


def split(planes: Planes, block_c: int, block_p: int) -> tuple[int, int, int]:
    """Blocks of channels, and the parts that positions are split into, of how many tiles each."""
    c_blocks, p_blocks = planes.blocks(block_c, block_p)
    tiles = max(1, c_blocks * p_blocks // PROGRAMS)
    # Parts as even as can be.
    parts = triton.cdiv(p_blocks, tiles)
    tiles = triton.cdiv(p_blocks, parts)
    return c_blocks, triton.cdiv(p_blocks, tiles), tiles


class GroupNorm:
    """The three launches for tensors of one shape.

    scratch: numbers of memory between them: two of each part of each channel, then two of each
        channel, its mean without what is added and its scale.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        dtype_y: torch.dtype,
        last: bool,
        last_y: bool,
        groups: int,
        eps: float,
        silu: bool,
    ) -> None:
        planes = Planes.of(shape, dtype, dtype_y)
        acc = Tiling.acc(dtype)
        rows = planes.samples * planes.channels
        block_c, block_p = planes.tile(STATISTICS, last)
        c_blocks, parts, tiles = split(planes, block_c, block_p)
        all_parts = rows * parts
        self.scratch = 2 * all_parts + 2 * rows
        self.statistics = Launch(
            group_statistics_kernel,
            (planes.samples * parts * c_blocks, 1),
            (*planes.numbers, all_parts, c_blocks, parts, tiles),
            {**planes.units, "LAST": last, "BLOCK_C": block_c, "BLOCK_P": block_p, "ACC": acc},
            # Several threads make one sum, and have to make the same: see docs/kernels.md on the
            # focused map.
            {"num_warps": warps(block_c * block_p, 32), "num_stages": 1, "enable_fp_fusion": False},
        )
        block = min(triton.next_power_of_2(planes.channels // groups * parts), PARTS)
        self.merge = Launch(
            group_merge_kernel,
            (planes.samples * groups, 1),
            (all_parts, rows, planes.positions, tiles * block_p, eps, groups,
             planes.channels // groups, parts),
            {"BLOCK": block, "ACC": acc},
            {"num_warps": warps(block, 8), "num_stages": 1, "enable_fp_fusion": False},
        )  # fmt: skip
        block_c, block_p = planes.tile(APPLY, last, last_y)
        c_blocks, p_blocks = planes.blocks(block_c, block_p)
        self.apply = Launch(
            group_apply_kernel,
            (planes.samples * p_blocks * c_blocks, 1),
            (*planes.numbers, all_parts, rows, c_blocks, p_blocks),
            {
                **planes.units,
                "LAST": last,
                "LAST_Y": last_y,
                "BLOCK_C": block_c,
                "BLOCK_P": block_p,
                "SILU": silu,
                "ACC": acc,
            },
            {"num_warps": warps(block_c * block_p, 32), "num_stages": 1},
        )

    def __call__(
        self,
        x: torch.Tensor,
        shift: torch.Tensor | None,
        x_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        y: torch.Tensor,
        statistics: torch.Tensor | None = None,
    ) -> None:
        """statistics: filled with the mean and 1 / deviation of each group, `(2, B, groups)`."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scratch = x.new_empty(self.scratch, dtype=wide)
        self.statistics(x, scratch)
        self.merge(scratch, shift, x_bias, weight, statistics)
        self.apply(x, scratch, bias, y)

"""GroupNorm in one launch, a program a group, for groups that are short (`group_sizes.py`).

The formula is that of `group_norm.py`. The group is read three times: for its mean, for the squares
about it, and for the result; the second and the third time from the caches.
"""

import torch
import triton
import triton.language as tl

from .channels import Planes, inside, sample_offset, tile_offset, warps
from .group_norm import added, normalized
from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile, and its channels in channels_last.
ELEMENTS, CHANNELS = 8192, 128


@triton.jit
def group_tile(
    x, shift, x_bias, row, first, c, p, channels, positions, group_channels,
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_G: tl.constexpr, LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x and what is added to it from channel c of the group and position p on; where; which."""
    o = c + tl.arange(0, BLOCK_C)
    m_c = inside(o, group_channels, UNIT_G)
    o_c = first + o
    o_p = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
    mask = m_c[:, None] & inside(o_p, positions, UNIT_P)[None, :]
    o_x = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST)
    b_x = tl.load(x + o_x, mask=mask, other=0.0).to(ACC)
    return b_x + added(shift, x_bias, row, o_c, m_c, ACC)[:, None], o_x, mask


@kernel
def short_group_norm_kernel(
    x, shift, x_bias, weight, bias, y, statistics,
    channels: "i64", positions: "i64", eps: "fp64", groups: "i32", group_channels: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_G: tl.constexpr,
    LAST: tl.constexpr, LAST_Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_g, i_b = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    C, P, G = channels * UNIT_C, positions * UNIT_P, group_channels * UNIT_G
    first = i_g.to(tl.int64) * G
    sample = sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    x += sample
    y += sample
    whole = 1.0 / (P.to(ACC) * G)
    b_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    for c in range(0, G, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            b_z, _, mask = group_tile(
                x, shift, x_bias, i_b * C, first, c, p, channels, positions, group_channels,
                UNIT_C, UNIT_P, UNIT_G, LAST, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            b_sum += tl.where(mask, b_z, 0.0)
    mean = tl.sum(b_sum) * whole
    b_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    b_square = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    for c in range(0, G, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            b_z, _, mask = group_tile(
                x, shift, x_bias, i_b * C, first, c, p, channels, positions, group_channels,
                UNIT_C, UNIT_P, UNIT_G, LAST, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            b_d = tl.where(mask, b_z - mean, 0.0)
            b_sum += b_d
            b_square += b_d * b_d
    # The mean was rounded.
    rest = tl.sum(b_sum) * whole
    mean += rest
    variance = tl.sum(b_square) * whole - rest * rest
    inverse = 1.0 / tl.sqrt(variance + tl.full((), eps, ACC))
    if statistics is not None:
        tl.store(statistics + tl.program_id(0), mean)
        tl.store(statistics + tl.num_programs(0) + tl.program_id(0), inverse)
    for c in range(0, G, BLOCK_C):
        o = c + tl.arange(0, BLOCK_C)
        m_c = inside(o, group_channels, UNIT_G)
        b_w = tl.load(weight + first + o, mask=m_c, other=0.0).to(ACC) * inverse
        b_b = tl.load(bias + first + o, mask=m_c, other=0.0).to(ACC)
        for p in range(0, P, BLOCK_P):
            b_z, o_y, mask = group_tile(
                x, shift, x_bias, i_b * C, first, c, p, channels, positions, group_channels,
                UNIT_C, UNIT_P, UNIT_G, LAST, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            b_y = normalized(b_z, mean, b_w[:, None], b_b[:, None], SILU)
            if LAST != LAST_Y:
                o_p = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
                o_y = tile_offset(first + o, o_p, channels, positions, UNIT_C, UNIT_P, LAST_Y)
            tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=mask)


class ShortGroupNorm:
    """The launch for tensors of one shape."""

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
        group = planes._replace(channels=planes.channels // groups)
        block_c, block_p = group.tile(ELEMENTS, last, last_y)
        self.launch = Launch(
            short_group_norm_kernel,
            (planes.samples * groups, 1),
            (*planes.numbers, eps, groups, group.numbers[0]),
            {
                **planes.units,
                "UNIT_G": group.units["UNIT_C"],
                "LAST": last,
                "LAST_Y": last_y,
                "BLOCK_C": block_c,
                "BLOCK_P": block_p,
                "SILU": silu,
                "ACC": Tiling.acc(dtype),
            },
            {"num_warps": warps(block_c * block_p), "num_stages": 1, "enable_fp_fusion": False},
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
        """statistics: as in `GroupNorm`."""
        self.launch(x, shift, x_bias, weight, bias, y, statistics)

"""The gradient of GroupNorm with SiLU by its input in one launch, a program a group.

The formula is that of `group_norm_backward.py`. A group of x and dy is read twice, the second time
from the caches.
"""

import torch
import triton
import triton.language as tl

from .channels import Planes, inside, sample_offset, tile_offset, warps
from .group_norm_backward import grad_terms
from .launch import Launch, kernel
from .short_group_norm import ELEMENTS, group_tile
from .tiling import Tiling


@triton.jit
def grad_tile(
    x, dy, shift, x_bias, weight, bias, mean, inverse,
    row, first, c, p, channels, positions, group_channels,
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_G: tl.constexpr,
    LAST: tl.constexpr, LAST_Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h and g from channel c of the group and position p on; where they are in x; which."""
    b_z, o_x, mask = group_tile(
        x, shift, x_bias, row, first, c, p, channels, positions, group_channels,
        UNIT_C, UNIT_P, UNIT_G, LAST, BLOCK_C, BLOCK_P, ACC,
    )  # fmt: skip
    o = c + tl.arange(0, BLOCK_C)
    m_c = inside(o, group_channels, UNIT_G)
    o_c = first + o
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(ACC)
    b_b = tl.load(bias + o_c, mask=m_c, other=0.0).to(ACC)
    o_y = o_x
    if LAST != LAST_Y:
        o_p = (p + tl.arange(0, BLOCK_P)).to(tl.int64)
        o_y = tile_offset(o_c, o_p, channels, positions, UNIT_C, UNIT_P, LAST_Y)
    b_dy = tl.load(dy + o_y, mask=mask, other=0.0).to(ACC)
    b_h, b_g = grad_terms(b_z, b_dy, mean, inverse, b_w[:, None], b_b[:, None], SILU)
    return b_h, b_g, o_x, mask


@kernel
def short_group_norm_backward_kernel(
    x, dy, shift, x_bias, weight, bias, statistics, dx,
    channels: "i64", positions: "i64", groups: "i32", group_channels: "i32",
    UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_G: tl.constexpr,
    LAST: tl.constexpr, LAST_Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_g, i_b = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    C, P, G = channels * UNIT_C, positions * UNIT_P, group_channels * UNIT_G
    first = i_g.to(tl.int64) * G
    sample = sample_offset(i_b, channels, positions, UNIT_C, UNIT_P)
    x += sample
    dy += sample
    dx += sample
    mean = tl.load(statistics + tl.program_id(0))
    inverse = tl.load(statistics + tl.num_programs(0) + tl.program_id(0))
    b_sum = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    b_dot = tl.zeros((BLOCK_C, BLOCK_P), dtype=ACC)
    for c in range(0, G, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            b_h, b_g, _, _ = grad_tile(
                x, dy, shift, x_bias, weight, bias, mean, inverse,
                i_b * C, first, c, p, channels, positions, group_channels,
                UNIT_C, UNIT_P, UNIT_G, LAST, LAST_Y, BLOCK_C, BLOCK_P, SILU, ACC,
            )  # fmt: skip
            b_sum += b_g
            b_dot += b_g * b_h
    whole = 1.0 / (P.to(ACC) * G)
    mean_g = tl.sum(b_sum) * whole
    mean_gh = tl.sum(b_dot) * whole
    for c in range(0, G, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            b_h, b_g, o_x, mask = grad_tile(
                x, dy, shift, x_bias, weight, bias, mean, inverse,
                i_b * C, first, c, p, channels, positions, group_channels,
                UNIT_C, UNIT_P, UNIT_G, LAST, LAST_Y, BLOCK_C, BLOCK_P, SILU, ACC,
            )  # fmt: skip
            b_dx = (b_g - mean_g - b_h * mean_gh) * inverse
            tl.store(dx + o_x, b_dx.to(dx.dtype.element_ty), mask=mask)


class ShortGroupNormBackward:
    """The launch for tensors of one shape."""

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
        group = planes._replace(channels=planes.channels // groups)
        block_c, block_p = group.tile(ELEMENTS, last, last_y)
        self.launch = Launch(
            short_group_norm_backward_kernel,
            (planes.samples * groups, 1),
            (*planes.numbers, groups, group.numbers[0]),
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

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor | None) -> None:
        """tensors: dy, shift, x_bias, weight, bias, statistics and dx."""
        self.launch(x, *tensors)

"""A depthwise k x k convolution and a grouped 1 x 1 convolution behind it, in one launch.

    z_c = sum_ij taps_ijc x_c(h + i - k // 2, w + j - k // 2) + taps_bias_c
    y_o = sum_c pointwise_oc z_c + pointwise_bias_o,            o and c of one group of D channels

A program takes the D channels of a group at `BLOCK_H * BLOCK_W` positions. z, rounded to x's dtype,
never leaves it. The k * k shifted tiles of x overlap, and come from the caches but for the first.

Tiles are `(positions, channels)` in channels_last and `(channels, positions)` in NCHW: the axis
that is contiguous in memory is the last. taps are `(k * k, C)` in the dtype of the sums in
channels_last, where a thread has several channels, and in NCHW, where a warp has one at a time,
`(C, k * k)` as the weight is.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .tiling import Tiling

# Elements of a tile, by bytes of an element.
ELEMENTS = {2: 4096, 4: 2048, 8: 1024}
# The width of a tile: as near to a square as the wide stores of NCHW allow, for a small margin.
WIDTH, WIDTH_LAST = 32, 16


@triton.jit
def by_channel(v, LAST: tl.constexpr):
    """(BLOCK_D,) along the channels of a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def by_position(v, LAST: tl.constexpr):
    """(positions,) along the positions of a tile."""
    return v[:, None] if LAST else v[None, :]


@kernel
def separable_conv_kernel(
    x, taps, taps_bias, pointwise, pointwise_bias, y,
    x_sample: "i64", x_channel: "i64", x_row: "i64", x_column: "i64", y_sample: "i64",
    height: "i32", width: "i32", groups: "i32", h_blocks: "i32", w_blocks: "i32",
    UNIT: tl.constexpr, UNIT_W: tl.constexpr, UNIT_Y: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # Groups are fastest: in channels_last they share the lines that theirs begin and end in.
    i_g, i_t = (tl.program_id(0) % groups).to(tl.int64), tl.program_id(0) // groups
    i_w, i_t = i_t % w_blocks, i_t // w_blocks
    i_h, i_b = i_t % h_blocks, (i_t // h_blocks).to(tl.int64)
    W = width * UNIT_W
    C = groups.to(tl.int64) * D
    o_p = tl.arange(0, BLOCK_H * BLOCK_W)
    o_h, o_w = i_h * BLOCK_H + o_p // BLOCK_W, i_w * BLOCK_W + o_p % BLOCK_W
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_g * D + o_d
    m_d = o_d < D
    m_c = by_channel(m_d, LAST)
    # Strides are in units of UNIT elements, but that of the contiguous axis, which is 1.
    x_row, x_column = x_row * UNIT, 1 if not LAST else x_column * UNIT
    p_x = x + i_b * (x_sample * UNIT) + by_channel(o_c if LAST else o_c * (x_channel * UNIT), LAST)
    p_x += by_position(o_h.to(tl.int64) * x_row + o_w.to(tl.int64) * x_column, LAST)
    b_z = by_channel(tl.zeros((BLOCK_D,), dtype=ACC), LAST)
    b_z += by_position(tl.zeros((BLOCK_H * BLOCK_W,), dtype=ACC), LAST)
    for i in range(0, KERNEL):
        o_i = o_h + (i - KERNEL // 2)
        m_i = (o_i >= 0) & (o_i < height)
        p_row = p_x + (i - KERNEL // 2) * x_row
        for j in tl.static_range(0, KERNEL):
            o_j = o_w + (j - KERNEL // 2)
            mask = m_c & by_position(m_i & (o_j >= 0) & (o_j < W), LAST)
            b_x = tl.load(p_row + (j - KERNEL // 2) * x_column, mask=mask, other=0.0).to(ACC)
            if LAST:
                p_tap = taps + (i * KERNEL + j) * C + o_c
            else:
                p_tap = taps + o_c * (KERNEL * KERNEL) + (i * KERNEL + j)
            b_tap = tl.load(p_tap, mask=m_d, other=0.0).to(ACC)
            b_z = tl.fma(b_x, tl.broadcast_to(by_channel(b_tap, LAST), b_x.shape), b_z)
    if taps_bias is not None:
        b_bias = tl.load(taps_bias + o_c, mask=m_d, other=0.0).to(ACC)
        b_z += by_channel(b_bias, LAST)
    o_in, o_out = by_position(o_d, LAST), by_channel(o_d, LAST)
    m_w = by_position(m_d, LAST) & by_channel(m_d, LAST)
    # W^T in channels_last, W in NCHW.
    b_w = tl.load(pointwise + (i_g * D + o_out) * D + o_in, mask=m_w, other=0.0)
    b_z = b_z.to(b_w.dtype)
    # float32 means float32.
    if LAST:
        b_y = tl.dot(b_z, b_w, input_precision="ieee", out_dtype=ACC)
    else:
        b_y = tl.dot(b_w, b_z, input_precision="ieee", out_dtype=ACC)
    if pointwise_bias is not None:
        b_bias = tl.load(pointwise_bias + o_c, mask=m_d, other=0.0).to(ACC)
        b_y += by_channel(b_bias, LAST)
    # A sample of y is dense.
    plane = height.to(tl.int64) * W
    sample = y + i_b * (y_sample * UNIT_Y)
    position = o_h.to(tl.int64) * W + o_w
    if LAST:
        p_y = sample + by_channel(o_c, LAST) + by_position(position * C, LAST)
    else:
        p_y = sample + by_channel(o_c * plane, LAST) + by_position(position, LAST)
    mask = m_c & by_position((o_h < height) & (o_w < W), LAST)
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def plan_separable_conv(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    group_channels: int,
    kernel_size: int,
    y_sample: int,
) -> Launch:
    """shape, stride: of x, whose channels are contiguous where `last`, and whose rows elsewhere.

    y_sample: elements from one sample of y to the next.
    """
    B, C, H, W = shape
    block_d = max(16, triton.next_power_of_2(group_channels))
    positions = ELEMENTS[dtype.itemsize] // block_d
    block_w = min(triton.next_power_of_2(W), WIDTH_LAST if last else WIDTH, positions)
    block_h = min(triton.next_power_of_2(H), positions // block_w)
    # Products have 16 rows at least.
    block_h = max(block_h, 16 // block_w)
    # An axis of length 1 may have any stride; it is never stepped along.
    strides = [s if n > 1 else 0 for s, n in zip(stride, shape, strict=True)]
    strides[1 if last else 3] = 0
    # The taps of NCHW are shifted along the contiguous axis: every second one is aligned by pairs.
    wide = 16 // dtype.itemsize if last else 2
    unit, unit_w = math.gcd(wide, *strides), 1 if last else math.gcd(wide, W)
    y_sample = y_sample if B > 1 else 0
    # Samples need not be aligned to more than pixels or rows are.
    unit_y = math.gcd(y_sample, wide, group_channels if last else unit_w)
    steps = [*(s // unit for s in strides), y_sample // unit_y]
    groups, h_blocks, w_blocks = (
        C // group_channels, triton.cdiv(H, block_h), triton.cdiv(W, block_w)
    )  # fmt: skip
    return Launch(
        separable_conv_kernel,
        (B * h_blocks * w_blocks * groups, 1),
        (*steps, H, W // unit_w, groups, h_blocks, w_blocks),
        {
            "UNIT": unit,
            "UNIT_W": unit_w,
            "UNIT_Y": unit_y,
            "LAST": last,
            "D": group_channels,
            "KERNEL": kernel_size,
            "BLOCK_D": block_d,
            "BLOCK_H": block_h,
            "BLOCK_W": block_w,
            "ACC": Tiling.acc(dtype),
        },
        {"num_warps": 4 if last else 8, "num_stages": 1},
    )

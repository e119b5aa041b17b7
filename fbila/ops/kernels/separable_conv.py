"""A depthwise k x k convolution and a grouped 1 x 1 convolution behind it, in one launch.

    z_c = sum_ij taps_ijc x_c(h + i - k // 2, w + j - k // 2) + taps_bias_c
    y_o = sum_c pointwise_oc z_c + pointwise_bias_o,            o and c of one group of D channels

A program has the D channels of a group in `LANES` lanes. A lane is `PIXELS` columns of a picture,
down which it goes for a chunk of its rows; the lanes of all samples are numbered through, so that
small pictures fill a program together. A row of z, rounded to x's dtype, is multiplied as soon as
it is complete, and never leaves the program. What loads, converts and masks a pixel once for all
its taps is in `rolling_rows.py`.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .rolling_rows import (
    add_row,
    begin,
    join,
    load_row,
    load_taps,
    pixels_of,
    place,
    split_rows,
)
from .tiling import Tiling

# Lanes of a program in NCHW and in channels_last, as far as it has so many threads: with 5 x 5 taps
# a thread takes 128 registers of a multiprocessor's 65536 in NCHW, and 168 in channels_last.
LANES, LANES_LAST, THREADS = 2, 4, 128
# The most and, for the sake of more programs, the fewest rows of a chunk, of which k - 1 more are
# read than written.
ROWS, FEWEST_ROWS = 64, 8
# Enough for every multiprocessor several times.
PROGRAMS = 1024


@triton.jit
def by_channel(v, LAST: tl.constexpr):
    """(BLOCK_D,) along the channels of a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def by_position(v, LAST: tl.constexpr):
    """(lanes,) or (positions,) along those of a tile."""
    return v[:, None] if LAST else v[None, :]


@kernel
def separable_conv_kernel(
    x, taps, taps_bias, pointwise, pointwise_bias, y,
    x_sample: "i64", x_channel: "i64", x_row: "i64", x_column: "i64", y_sample: "i64",
    samples: "i32", height: "i32", width: "i32", groups: "i32",
    strips: "i32", chunks: "i32", rows: "i32", above: "i32",
    UNIT: tl.constexpr, UNIT_W: tl.constexpr, UNIT_Y: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, KERNEL: tl.constexpr, BLOCK_D: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Groups are fastest: in channels_last they share the lines that theirs begin and end in.
    i_g, lane = (tl.program_id(0) % groups).to(tl.int64), tl.program_id(0) // groups * LANES
    W = width * UNIT_W
    C = tl.cast(groups, tl.int64) * D
    o_d = tl.arange(0, BLOCK_D)
    o_c = i_g * D + o_d
    m_d = o_d < D
    m_c = by_channel(m_d, LAST)
    # Strides are in units of UNIT elements, but that of the contiguous axis, which is 1.
    x_row, x_column = x_row * UNIT, 1 if not LAST else x_column * UNIT
    i_b, first, i_s = place(lane + tl.arange(0, LANES), strips, chunks, rows)
    first -= above
    p_x = x + by_channel(o_c if LAST else o_c * (x_channel * UNIT), LAST)
    o_x = i_s * PIXELS
    start = first.to(tl.int64) * x_row + o_x.to(tl.int64) * x_column
    p_x += by_position(i_b * (x_sample * UNIT) + start, LAST)
    o_x, row = by_position(o_x, LAST), by_position(first, LAST)
    # Of what is read: rows below belong to the next chunk.
    end = tl.minimum(row + (above + rows + KERNEL // 2), height)
    m_x = m_c & by_position(i_b < samples, LAST)

    b_z = by_channel(tl.zeros((BLOCK_D,), dtype=ACC), LAST)
    b_z += by_position(tl.zeros((LANES,), dtype=ACC), LAST)
    b_taps = load_taps(taps + by_channel(o_c, LAST) * (KERNEL * KERNEL), m_c, b_z, KERNEL)
    if taps_bias is not None:
        b_bias = tl.load(taps_bias + o_c, mask=m_d, other=0.0).to(ACC)
        b_z += by_channel(b_bias, LAST)
    sums = begin(b_z, PIXELS, KERNEL)
    o_in, o_out = by_position(o_d, LAST), by_channel(o_d, LAST)
    m_w = by_position(m_d, LAST) & by_channel(m_d, LAST)
    # W^T in channels_last, W in NCHW.
    b_w = tl.load(pointwise + (i_g * D + o_out) * D + o_in, mask=m_w, other=0.0)

    # A sample of y is dense.
    o_p = tl.arange(0, LANES * PIXELS)
    i_b, first, i_s = place(lane + o_p // PIXELS, strips, chunks, rows)
    o_y = i_s * PIXELS + o_p % PIXELS
    m_y = m_c & by_position((i_b < samples) & (o_y < W), LAST)
    position = first.to(tl.int64) * W + o_y
    sample = i_b * (y_sample * UNIT_Y)
    y_row = W.to(tl.int64)
    if LAST:
        y_row *= C
        p_y = y + by_channel(o_c, LAST) + by_position(sample + position * C, LAST)
    else:
        p_y = y + by_channel(o_c * (height * y_row), LAST) + by_position(sample + position, LAST)
    left = by_position(tl.minimum(height - first, rows), LAST)

    # The next row is on its way while one is added.
    m_row = m_x & (row >= 0) & (row < end)
    ahead = load_row(p_x, x_column, o_x, W, m_row, LAST, PIXELS, KERNEL)
    for _ in range(0, above + KERNEL // 2):
        pixels = pixels_of(ahead, LAST, PIXELS, KERNEL, ACC)
        row += 1
        p_x += x_row
        m_row = m_x & (row >= 0) & (row < end)
        ahead = load_row(p_x, x_column, o_x, W, m_row, LAST, PIXELS, KERNEL)
        z, sums = add_row(sums, pixels, b_taps, b_z, PIXELS, KERNEL)
    for i in range(0, rows):
        pixels = pixels_of(ahead, LAST, PIXELS, KERNEL, ACC)
        row += 1
        p_x += x_row
        m_row = m_x & (row >= 0) & (row < end)
        ahead = load_row(p_x, x_column, o_x, W, m_row, LAST, PIXELS, KERNEL)
        z, sums = add_row(sums, pixels, b_taps, b_z, PIXELS, KERNEL)
        b_y = join(z)
        # float32 means float32.
        if LAST:
            b_y = tl.reshape(tl.permute(b_y, (0, 2, 1)), (LANES * PIXELS, BLOCK_D)).to(b_w.dtype)
            b_y = tl.dot(b_y, b_w, input_precision="ieee", out_dtype=ACC)
        else:
            b_y = tl.reshape(b_y, (BLOCK_D, LANES * PIXELS)).to(b_w.dtype)
            b_y = tl.dot(b_w, b_y, input_precision="ieee", out_dtype=ACC)
        if pointwise_bias is not None:
            b_bias = tl.load(pointwise_bias + o_c, mask=m_d, other=0.0).to(ACC)
            b_y += by_channel(b_bias, LAST)
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y & (i < left))
        p_y += y_row


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
    # Of a thread: channels, whose taps stay in its registers, and pixels, in NCHW 16 bytes.
    if last:
        channels, pixels, lanes = 1 if dtype.itemsize == 8 else 2, 4, LANES_LAST
    else:
        channels, pixels, lanes = 1, 8 if dtype.itemsize == 2 else 4, LANES
    # Products have 16 positions at least.
    lanes = max(min(lanes, THREADS * channels // block_d), 16 // pixels)
    groups, strips = C // group_channels, triton.cdiv(W, pixels)
    chunks, rows = split_rows(
        H, groups * triton.cdiv(B * strips, lanes), ROWS, FEWEST_ROWS, PROGRAMS
    )
    # Rows above the picture are left out where all lanes begin at its top.
    above = 0 if chunks == 1 else kernel_size // 2
    # An axis of length 1 may have any stride; it is never stepped along.
    strides = [s if n > 1 else 0 for s, n in zip(stride, shape, strict=True)]
    strides[1 if last else 3] = 0
    wide = 16 // dtype.itemsize
    unit, unit_w = math.gcd(wide, *strides), 1 if last else math.gcd(wide, W)
    y_sample = y_sample if B > 1 else 0
    # Samples need not be aligned to more than pixels or rows are.
    unit_y = math.gcd(y_sample, wide, group_channels if last else unit_w)
    steps = [*(s // unit for s in strides), y_sample // unit_y]
    return Launch(
        separable_conv_kernel,
        (groups * triton.cdiv(B * chunks * strips, lanes), 1),
        (*steps, B, H, W // unit_w, groups, strips, chunks, rows, above),
        {
            "UNIT": unit,
            "UNIT_W": unit_w,
            "UNIT_Y": unit_y,
            "LAST": last,
            "D": group_channels,
            "KERNEL": kernel_size,
            "BLOCK_D": block_d,
            "LANES": lanes,
            "PIXELS": pixels,
            "ACC": Tiling.acc(dtype),
        },
        {"num_warps": max(1, lanes * block_d // (32 * channels)), "num_stages": 1},
    )

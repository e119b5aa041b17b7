"""A depthwise k x k convolution of tokens on a grid, and what is around it, in one launch.

    z_c = bias_c + sum_ij taps_ijc f(x_c(h + i - k // 2, w + j - k // 2)),      f: identity or GELU
    ""       y = z + other          "silu"        y = SiLU(z + other)
    "slope"  y = other SiLU'(z)     "gelu slope"  y = z GELU'(other)

and the first two times a gate, if there is one. x, other, gate, y: `(B, H, W, C)`, contiguous along
C; other may be missing where there may be a gate. It is computed in float32 and rounded once. With
the taps turned by half a turn, z is the gradient by f(x); the slopes make gradients of the first
two. f(x) itself is added as one more to the tap in the middle.

A program has a block of channels in `LANES` lanes. A lane is `PIXELS` columns of a grid, down which
it goes for a chunk of its rows; the lanes of all samples are numbered through, so that small grids
fill a program together. See `rolling_rows.py`.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .channels import inside
from .features import exp
from .gated_conv import silu, silu_and_slope
from .lanes import Lanes, strides_of
from .launch import Launch, kernel
from .rolling_rows import (
    add_row,
    begin,
    load_pixels,
    load_row,
    load_taps,
    pixels_of,
    place,
)
from .tiling import Tiling

# Columns of a lane, of which k - 1 more are read than written, and bytes of a thread's channels: of
# x alone, and with other tensors beside it. What is on its way to the registers bounds the speed,
# and taps and sums take most of them.
PIXELS, BYTES, BYTES_BESIDE = 8, {3: 4, 5: 2}, 2
# Of a program, and as many of these as fill every multiprocessor several times.
THREADS, PROGRAMS = 64, 1024


@triton.jit
def gelu_and_slope(x):
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * below, below + x * (0.3989422804014327 * exp(-0.5 * x * x))


@triton.jit
def gelu_of(tiles):
    found = ()
    for j in tl.static_range(len(tiles)):
        found += (gelu_and_slope(tiles[j])[0],)
    return found


@triton.jit
def finish(z, other, END: tl.constexpr):
    if END == "slope":
        y = other * silu_and_slope(z)[1]
    elif END == "gelu slope":
        y = z * gelu_and_slope(other)[1]
    else:
        y = z + other
    return y


@triton.jit
def start_of(p, i_b, first, column, o_c, sample, row, step):
    """Where lanes begin in a tensor beside x."""
    p += (i_b * sample)[:, None] + o_c[None, :]
    return p + (first[:, None].to(tl.int64) * row + column * step)


@triton.jit
def load_below(
    p, row_step, step, row, end, o_x, width, there,
    BELOW: tl.constexpr, PIXELS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """What `load_row` does, of the row so many below the `row`th, which is at p, if it is read."""
    mask = there & (row >= -BELOW) & (row + BELOW < end)
    return load_row(p + BELOW * row_step, step, o_x, width, mask, True, PIXELS, KERNEL)


@triton.jit
def next_rows(
    later, p, row_step, step, row, end, o_x, width, there,
    TWO_AHEAD: tl.constexpr, PIXELS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """The `row`th row, which is at p, and what is on its way behind it."""
    if TWO_AHEAD:
        below = load_below(p, row_step, step, row, end, o_x, width, there, 1, PIXELS, KERNEL)
        return later, below
    else:
        ahead = load_below(p, row_step, step, row, end, o_x, width, there, 0, PIXELS, KERNEL)
        return ahead, later


@kernel
def depthwise_conv_kernel(
    x, taps, bias, other, gate, y,
    x_sample: "i64", x_row: "i64", x_column: "i64",
    a_sample: "i64", a_row: "i64", a_column: "i64",
    g_sample: "i64", g_row: "i64", g_column: "i64",
    samples: "i32", height: "i32", width: "i32", channels: "i32",
    sets: "i32", of_samples: "i32", strips: "i32", chunks: "i32", rows: "i32", above: "i32",
    UNIT: tl.constexpr, UNIT_A: tl.constexpr, UNIT_G: tl.constexpr, UNIT_C: tl.constexpr,
    TURNED: tl.constexpr, RESIDUAL: tl.constexpr, GELU: tl.constexpr, END: tl.constexpr,
    KERNEL: tl.constexpr, TWO_AHEAD: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Blocks of channels are fastest: programs that run together share the lines they meet in.
    C = tl.cast(channels, tl.int64) * UNIT_C
    blocks = tl.cdiv(C, BLOCK).to(tl.int32)
    o_c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.program_id(0) // blocks * LANES + tl.arange(0, LANES)
    m_c = inside(o_c, channels, UNIT_C)[None, :]
    i_b, first, i_s = place(lane, strips, chunks, rows)
    there = (i_b < samples)[:, None] & m_c
    o_x = (i_s * PIXELS)[:, None]
    column = o_x.to(tl.int64)

    b_0 = tl.zeros((LANES, BLOCK), dtype=ACC)
    # As many sets of taps as there are, in turn: one for all channels, for a head's, or a sample's.
    o_t = ((i_b * of_samples)[:, None] * C + o_c[None, :]) % (tl.cast(sets, tl.int64) * UNIT_C)
    b_taps = load_taps(taps + o_t * (KERNEL * KERNEL), there, b_0, KERNEL, TURNED, RESIDUAL)
    if bias is not None:
        b_0 += tl.load(bias + o_t, mask=there, other=0.0).to(ACC)
    sums = begin(b_0, PIXELS, KERNEL)

    row = (first - above)[:, None]
    # Of what is read: rows below belong to the next chunk.
    end = tl.minimum(row + (above + rows + KERNEL // 2), height)
    p_x = x + (i_b * (x_sample * UNIT))[:, None] + o_c[None, :]
    p_x += row.to(tl.int64) * (x_row * UNIT) + column * (x_column * UNIT)
    # The next rows are on their way while one is added.
    down, right = x_row * UNIT, x_column * UNIT
    ahead = load_below(p_x, down, right, row, end, o_x, width, there, 0, PIXELS, KERNEL)
    later = ahead
    if TWO_AHEAD:
        later = load_below(p_x, down, right, row, end, o_x, width, there, 1, PIXELS, KERNEL)
    for _row in range(0, above + KERNEL // 2):
        pixels = pixels_of(ahead, True, PIXELS, KERNEL, ACC)
        if GELU:
            pixels = gelu_of(pixels)
        row += 1
        p_x += down
        ahead, later = next_rows(
            later, p_x, down, right, row, end, o_x, width, there, TWO_AHEAD, PIXELS, KERNEL
        )
        _z, sums = add_row(sums, pixels, b_taps, b_0, PIXELS, KERNEL)

    position = first[:, None].to(tl.int64) * width + column
    p_y = y + ((i_b * height)[:, None] * width + position) * C + o_c[None, :]
    left = tl.minimum(height - first, rows)[:, None]
    p_a, extra = other, ()
    if other is not None:
        step_a, row_a = a_column * UNIT_A, a_row * UNIT_A
        p_a = start_of(p_a, i_b, first, column, o_c, a_sample * UNIT_A, row_a, step_a)
        extra = load_pixels(p_a, step_a, o_x, width, there & (left > 0), PIXELS)
    p_g, factors = gate, ()
    if gate is not None:
        step_g, row_g = g_column * UNIT_G, g_row * UNIT_G
        p_g = start_of(p_g, i_b, first, column, o_c, g_sample * UNIT_G, row_g, step_g)
        factors = load_pixels(p_g, step_g, o_x, width, there & (left > 0), PIXELS)
    for i in range(0, rows):
        pixels = pixels_of(ahead, True, PIXELS, KERNEL, ACC)
        if GELU:
            pixels = gelu_of(pixels)
        row += 1
        p_x += down
        ahead, later = next_rows(
            later, p_x, down, right, row, end, o_x, width, there, TWO_AHEAD, PIXELS, KERNEL
        )
        beside, times = extra, factors
        m_next = there & (i + 1 < left)
        if other is not None:
            p_a += row_a
            extra = load_pixels(p_a, step_a, o_x, width, m_next, PIXELS)
        if gate is not None:
            p_g += row_g
            factors = load_pixels(p_g, step_g, o_x, width, m_next, PIXELS)
        z, sums = add_row(sums, pixels, b_taps, b_0, PIXELS, KERNEL)
        for j in tl.static_range(PIXELS):
            b_y = z[j]
            if other is not None:
                b_y = finish(b_y, beside[j].to(ACC), END)
            if END == "silu":
                b_y = silu(b_y)
            if gate is not None:
                b_y *= times[j].to(ACC)
            m_y = there & (i < left) & (o_x + j < width)
            tl.store(p_y + j * C, b_y.to(y.dtype.element_ty), mask=m_y)
        p_y += width * C


@lru_cache(maxsize=1024)
def plan_depthwise_conv(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    stride_a: tuple[int, ...] | None,
    stride_g: tuple[int, ...] | None,
    kernel_size: int,
    sets: int,
    dtypes: tuple[torch.dtype | None, ...],
    *,
    turned: bool = False,
    residual: bool = False,
    gelu: bool = False,
    end: str = "",
) -> Launch:
    """shape, stride: of x; stride_a, stride_g: of the other tensor and the gate, if they are there.

    sets: How many channels have taps of their own: all C, those of one head, or B * C.
    dtypes: Of x, taps, bias, the other tensor, the gate and y.
    turned: The taps by half a turn.
    residual: One more for the tap in the middle.
    gelu: Of x, first.
    end: What is done at the end, as above.
    """
    B, H, W, C = shape
    dtype, _, _, dtype_a, dtype_g, _ = dtypes
    assert dtype is not None
    wide = BYTES_BESIDE if dtype_a or dtype_g else BYTES[kernel_size]
    of_thread = max(1, wide // dtype.itemsize)
    plan = Lanes.of(shape, PIXELS, of_thread, THREADS, PROGRAMS)
    strides, unit = strides_of(shape, stride, dtype.itemsize)
    strides_a, unit_a = strides_of(shape, stride_a, dtype_a.itemsize if dtype_a else 1)
    strides_g, unit_g = strides_of(shape, stride_g, dtype_g.itemsize if dtype_g else 1)
    unit_c = math.gcd(16 // dtype.itemsize, C, sets)
    # Where a row takes long enough that the registers for another one are worth it.
    alone = dtype_a is None and dtype_g is None
    two_ahead = alone and dtype.itemsize == 2 and (kernel_size == 5 or gelu)
    # Rows above the grid are left out where all lanes begin at its top.
    above = 0 if plan.chunks == 1 else kernel_size // 2
    return Launch(
        depthwise_conv_kernel,
        (plan.programs(shape), 1),
        (
            *strides, *strides_a, *strides_g, B, H, W, C // unit_c, sets // unit_c,
            int(sets == B * C), plan.strips, plan.chunks, plan.rows, above,
        ),
        {
            "UNIT": unit,
            "UNIT_A": unit_a,
            "UNIT_G": unit_g,
            "UNIT_C": unit_c,
            "TURNED": turned,
            "RESIDUAL": residual,
            "GELU": gelu,
            "END": end,
            "KERNEL": kernel_size,
            "TWO_AHEAD": two_ahead,
            "BLOCK": plan.block,
            "LANES": plan.lanes,
            "PIXELS": PIXELS,
            "ACC": Tiling.acc(dtype),
        },
        {"num_warps": plan.warps, "num_stages": 1},
    )  # fmt: skip

"""The gradients of a depthwise convolution of tokens by its taps and its bias.

    dtap_ijc = sum_bhw dy_c(h - i + k // 2, w) f(x_c(h, w + j - k // 2)),    dbias_c = sum_bhw dy_c

f is the identity or GELU. x, dy `(B, H, W, C)`, contiguous along C -> the sums of each program,
`(parts, k k + 1, C)`: those of the taps and that of the bias, which `add_up.py` adds up. A
program has a block of channels in `LANES` lanes, which go down the rows of x with k rows of dy at
hand, of which each is read once.
What it sums is of one sample where samples have taps of their own.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .add_up import plan_add_up
from .channels import inside
from .depthwise_conv import gelu_of
from .lanes import Lanes, strides_of
from .launch import Launch, kernel
from .rolling_rows import load_pixels, load_row, pixels_of, place, without_first
from .tiling import Tiling

# As in `depthwise_conv.py`.
PIXELS, BYTES, THREADS = 8, {3: 8, 5: 4}, 128
# As many as run at once, two for every multiprocessor, or three of GELU's fewer channels: what each
# of them sums has to be added up.
PROGRAMS, PROGRAMS_GELU = 264, 396
# The fewest rows of a chunk, of which k - 1 more are read.
FEWEST_ROWS = 7


@triton.jit
def add_products(sums, window, below, pixels, PIXELS: tl.constexpr, KERNEL: tl.constexpr):
    """Adds a row of x times rows of dy, of which `window` has all but the lowest, in `below`."""
    total = ()
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            s = sums[i * KERNEL + j]
            for pixel in tl.static_range(PIXELS):
                # The row of dy that is i - k // 2 rows above that of x.
                if i == 0:  # noqa: SIM108  the window has no such row
                    d = below[pixel]
                else:
                    d = window[(KERNEL - 1 - i) * PIXELS + pixel]
                s = tl.fma(d, pixels[pixel + j], s)
            total += (s,)
    s = sums[KERNEL * KERNEL]
    for pixel in tl.static_range(PIXELS):
        s += window[KERNEL // 2 * PIXELS + pixel]
    total += (s,)
    return total


@kernel
def depthwise_conv_sums_kernel(
    x, dy, sums,
    x_sample: "i64", x_row: "i64", x_column: "i64",
    d_sample: "i64", d_row: "i64", d_column: "i64",
    height: "i32", width: "i32", channels: "i32",
    strips: "i32", chunks: "i32", rows: "i32", lanes: "i32", works: "i32", parts: "i32",
    UNIT: tl.constexpr, UNIT_D: tl.constexpr, UNIT_C: tl.constexpr, GELU: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = KERNEL // 2
    C = tl.cast(channels, tl.int64) * UNIT_C
    blocks = tl.cdiv(C, BLOCK).to(tl.int32)
    o_c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_p = tl.program_id(0) // blocks
    m_c = inside(o_c, channels, UNIT_C)
    zero = tl.zeros((LANES, BLOCK), dtype=ACC)
    total = ()
    for _ in tl.static_range(KERNEL * KERNEL + 1):
        total += (zero,)
    for work in range(i_p % parts, works, parts):
        lane = work * LANES + tl.arange(0, LANES)
        # Of all samples, or of the one that the part is of.
        i_b, first, i_s = place(lane, strips, chunks, rows)
        i_b = (i_b + i_p // parts)[:, None]
        there = (lane < lanes)[:, None] & m_c[None, :]
        o_x = (i_s * PIXELS)[:, None]
        row = first[:, None]
        end = tl.minimum(row + rows, height)
        start = row.to(tl.int64)
        p_x = x + i_b * (x_sample * UNIT) + o_c[None, :] + start * (x_row * UNIT)
        p_x += o_x.to(tl.int64) * (x_column * UNIT)
        p_d = dy + i_b * (d_sample * UNIT_D) + o_c[None, :] + (start - SIDE) * (d_row * UNIT_D)
        p_d += o_x.to(tl.int64) * (d_column * UNIT_D)
        window = ()
        for i in tl.static_range(KERNEL - 1):
            r = row + (i - SIDE)
            above = load_pixels(
                p_d, d_column * UNIT_D, o_x, width, there & (r >= 0) & (r < height), PIXELS
            )
            for j in tl.static_range(PIXELS):
                window += (above[j].to(ACC),)
            p_d += d_row * UNIT_D
        ahead = load_row(
            p_x, x_column * UNIT, o_x, width, there & (row < end), True, PIXELS, KERNEL
        )
        under = load_pixels(
            p_d, d_column * UNIT_D, o_x, width, there & (row + SIDE < height), PIXELS
        )
        for _row in range(0, rows):
            pixels = pixels_of(ahead, True, PIXELS, KERNEL, ACC)
            if GELU:
                pixels = gelu_of(pixels)
            below = ()
            for j in tl.static_range(PIXELS):
                below += (under[j].to(ACC),)
            # The next rows are on their way while these are multiplied.
            row += 1
            p_x += x_row * UNIT
            p_d += d_row * UNIT_D
            ahead = load_row(
                p_x, x_column * UNIT, o_x, width, there & (row < end), True, PIXELS, KERNEL
            )
            under = load_pixels(
                p_d, d_column * UNIT_D, o_x, width, there & (row + SIDE < height), PIXELS
            )
            total = add_products(total, window, below, pixels, PIXELS, KERNEL)
            window = without_first(window, PIXELS) + below
    p_s = sums + i_p.to(tl.int64) * (KERNEL * KERNEL + 1) * C + o_c
    for j in tl.static_range(KERNEL * KERNEL + 1):
        tl.store(p_s + j * C, tl.sum(total[j], 0), mask=m_c)


def divided(shape: tuple[int, ...], of_thread: int, programs: int) -> Lanes:
    """Lanes of grids `(B, H, W, C)`, as long as may be where all of them fill so many programs."""
    plan, H = Lanes.of(shape, PIXELS, of_thread, THREADS, 1), shape[1]
    chunks = plan.chunks * max(1, programs // plan.programs(shape))
    rows = triton.cdiv(H, min(chunks, triton.cdiv(H, FEWEST_ROWS)))
    return plan._replace(chunks=triton.cdiv(H, rows), rows=rows)


@lru_cache(maxsize=1024)
def plan_depthwise_conv_sums(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    stride_d: tuple[int, ...],
    kernel_size: int,
    sets: int,
    dtypes: tuple[torch.dtype | None, ...],
    gelu: bool,
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """The launches of both kernels, and the shape of the sums between them.

    dtypes: Of x, dy, the gradients of the taps and of the bias.
    gelu: Whether f is GELU.
    """
    B, H, W, C = shape
    dtype, dtype_d = dtypes[0], dtypes[1]
    assert dtype is not None and dtype_d is not None
    # Samples that share their taps fill programs together.
    groups = B if sets == B * C else 1
    together = (B // groups, *shape[1:])
    # GELU takes registers, too.
    wide = max(dtype.itemsize, dtype_d.itemsize) * (2 if gelu else 1)
    of_thread = max(1, BYTES[kernel_size] // wide)
    programs = PROGRAMS_GELU if gelu else PROGRAMS
    plan = divided(together, of_thread, programs // groups)
    strides, unit = strides_of(shape, stride, dtype.itemsize)
    strides_d, unit_d = strides_of(shape, stride_d, dtype_d.itemsize)
    unit_c = math.gcd(16 // max(dtype.itemsize, dtype_d.itemsize), C)
    lanes = B // groups * plan.strips * plan.chunks
    works = triton.cdiv(lanes, plan.lanes)
    blocks = triton.cdiv(C, plan.block)
    # As many for each part, if not one fewer for some.
    parts = triton.cdiv(works, triton.cdiv(works * blocks * groups, programs))
    sums = Launch(
        depthwise_conv_sums_kernel,
        (blocks * groups * parts, 1),
        (
            *strides, *strides_d, H, W, C // unit_c,
            plan.strips, plan.chunks, plan.rows, lanes, works, parts,
        ),
        {
            "UNIT": unit,
            "UNIT_D": unit_d,
            "UNIT_C": unit_c,
            "GELU": gelu,
            "KERNEL": kernel_size,
            "BLOCK": plan.block,
            "LANES": plan.lanes,
            "PIXELS": PIXELS,
            "ACC": Tiling.acc(dtype),
        },
        {"num_warps": plan.warps, "num_stages": 1},
    )  # fmt: skip
    taps = kernel_size**2
    add_up = plan_add_up(C, sets, parts, taps, sums.constants["ACC"], dtypes[2:])
    return sums, add_up, (groups * parts, taps + 1, C)

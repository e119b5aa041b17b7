"""A depthwise k x k convolution that goes down the rows of a picture and reads each of them once.

A row of the picture is a part of k rows of the result, of which the top one is complete then; what
is known of the others is kept. A thread has `PIXELS` pixels side by side, and loads those on either
side that taps reach. Rows, sums and taps are tuples of tiles, a tile for each pixel or tap, so that
a neighbour is in another register of the same thread.

Tiles of one pixel are `(LANES, BLOCK_D)` in channels_last, where a lane is a place to go down from,
and `(BLOCK_D, LANES)` in NCHW: what is contiguous in memory is the last.
"""

import triton
import triton.language as tl


@triton.jit
def place(lane, strips, chunks, rows):
    """A lane's sample, its first row, and its place among those side by side."""
    i_s, lane = lane % strips, lane // strips
    return (lane // chunks).to(tl.int64), lane % chunks * rows, i_s


def split_rows(height: int, programs: int, most: int, fewest: int, least: int) -> tuple[int, int]:
    """(chunks, rows of each) of pictures that would take so many programs undivided.

    Chunks of `most` rows, or of fewer, but no fewer than `fewest`, for `least` programs.
    """
    chunks = triton.cdiv(height, most)
    while programs * chunks < least and triton.cdiv(height, 2 * chunks) >= fewest:
        chunks *= 2
    rows = triton.cdiv(height, chunks)
    return triton.cdiv(height, rows), rows


@triton.jit
def load_taps(
    p, mask, zero, KERNEL: tl.constexpr,
    TURNED: tl.constexpr = False, RESIDUAL: tl.constexpr = False,
):  # fmt: skip
    """Row by row, of the type and the shape of `zero`.

    TURNED: by half a turn. RESIDUAL: one more for the tap in the middle.
    """
    taps = ()
    for j in tl.static_range(KERNEL * KERNEL):
        if TURNED:
            tap = tl.load(p + (KERNEL * KERNEL - 1 - j), mask=mask, other=0.0).to(zero.dtype)
        else:
            tap = tl.load(p + j, mask=mask, other=0.0).to(zero.dtype)
        if RESIDUAL and j == KERNEL * KERNEL // 2:
            tap += 1.0
        taps += (tl.broadcast_to(tap, zero.shape),)
    return taps


@triton.jit
def load_row(
    p, step, o_x, width, mask, LAST: tl.constexpr, PIXELS: tl.constexpr, KERNEL: tl.constexpr
):  # fmt: skip
    """What is loaded of a row, from left to right, in x's own type.

    p: at a thread's first pixel, the `o_x`th of the row; `step` elements from one to the next. In
    NCHW a thread's own pixels are side by side in memory, and one tile (BLOCK_D, LANES, PIXELS).
    """
    SIDE: tl.constexpr = KERNEL // 2
    row = ()
    for j in tl.static_range(SIDE):
        m = mask & (o_x >= SIDE - j)
        row += (tl.load(p + (j - SIDE) * step, mask=m, other=0.0),)
    if LAST:
        for j in tl.static_range(PIXELS):
            m = mask & (o_x + j < width)
            row += (tl.load(p + j * step, mask=m, other=0.0),)
    else:
        o_j = tl.arange(0, PIXELS)[None, None, :]
        m = mask[:, :, None] & (o_x[:, :, None] + o_j < width)
        row += (tl.load(p[:, :, None] + o_j, mask=m, other=0.0),)
    for j in tl.static_range(SIDE):
        m = mask & (o_x + (PIXELS + j) < width)
        row += (tl.load(p + (PIXELS + j) * step, mask=m, other=0.0),)
    return row


@triton.jit
def load_pixels(p, step, o_x, width, mask, PIXELS: tl.constexpr):
    """A thread's own pixels, without their neighbours."""
    row = ()
    for j in tl.static_range(PIXELS):
        row += (tl.load(p + j * step, mask=mask & (o_x + j < width), other=0.0),)
    return row


@triton.jit
def without_first(tiles, FIRST: tl.constexpr):
    """The tiles behind so many."""
    rest = ()
    for j in tl.static_range(len(tiles) - FIRST):
        rest += (tiles[FIRST + j],)
    return rest


@triton.jit
def pixels_of(
    row, LAST: tl.constexpr, PIXELS: tl.constexpr, KERNEL: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """`PIXELS + KERNEL - 1` tiles in the type of the sums, of what `load_row` returned."""
    SIDE: tl.constexpr = KERNEL // 2
    pixels = ()
    if LAST:
        for j in tl.static_range(PIXELS + KERNEL - 1):
            pixels += (row[j].to(ACC),)
    else:
        for j in tl.static_range(SIDE):
            pixels += (row[j].to(ACC),)
        own = split(row[SIDE])
        for j in tl.static_range(PIXELS):
            pixels += (own[j].to(ACC),)
        for j in tl.static_range(SIDE):
            pixels += (row[SIDE + 1 + j].to(ACC),)
    return pixels


@triton.jit
def begin(first, PIXELS: tl.constexpr, KERNEL: tl.constexpr):
    """The sums of `add_row` before anything is added."""
    sums = ()
    for _ in tl.static_range(PIXELS * (KERNEL - 1)):
        sums += (first,)
    return sums


@triton.jit
def add_row(sums, pixels, taps, first, PIXELS: tl.constexpr, KERNEL: tl.constexpr):
    """The row of results that these pixels complete, and the sums of those below it.

    sums: of the results that are begun, from the top. first: what a sum begins with. Whatever the
    other pixels are, a result is added up row by row, and from left to right.
    """
    complete, below = (), ()
    for i in tl.static_range(KERNEL):
        for pixel in tl.static_range(PIXELS):
            total = sums[i * PIXELS + pixel] if i < KERNEL - 1 else first
            for j in tl.static_range(KERNEL):
                total = tl.fma(pixels[pixel + j], taps[(KERNEL - 1 - i) * KERNEL + j], total)
            if i == 0:
                complete += (total,)
            else:
                below += (total,)
    return complete, below


@triton.jit
def split_4(x, A: tl.constexpr, B: tl.constexpr):
    x_02, x_13 = tl.split(tl.reshape(x, (A, B, 2, 2)))
    x_0, x_2 = tl.split(x_02)
    x_1, x_3 = tl.split(x_13)
    return x_0, x_1, x_2, x_3


@triton.jit
def split(x):
    """(A, B, 4 or 8) -> as many (A, B), whose elements are in one thread if those of x are."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if x.shape[2] == 4:
        return split_4(x, A, B)
    else:
        even, odd = tl.split(tl.reshape(x, (A, B, 4, 2)))
        x_0, x_2, x_4, x_6 = split_4(even, A, B)
        x_1, x_3, x_5, x_7 = split_4(odd, A, B)
        return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@triton.jit
def join_4(x_0, x_1, x_2, x_3):
    """Four (A, B) -> (A, B, 2, 2)"""
    return tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))


@triton.jit
def join(x):
    """4 or 8 tiles (A, B) -> (A, B, 4 or 8), in the threads that they are in."""
    if len(x) == 4:
        tile = join_4(x[0], x[1], x[2], x[3])
    else:
        tile = tl.join(join_4(x[0], x[2], x[4], x[6]), join_4(x[1], x[3], x[5], x[7]))
    return tl.reshape(tile, (tile.shape[0], tile.shape[1], len(x)))

"""Which rows and columns of a tile there are.

X is the width of a head dim, WIDTH that of a tile, and XB the column at which the next tile begins.
"""

import triton
import triton.language as tl


@triton.jit
def key_rows(mask, o_m, m_m, stride_mm):
    """The rows `m_m` that `mask` leaves, all of them where it is None."""
    if mask is None:
        return m_m
    else:
        return m_m & (tl.load(mask + o_m.to(tl.int64) * stride_mm, mask=m_m, other=0) != 0)


@triton.jit
def whole_blocks(start, end, BLOCK: tl.constexpr):
    """Where the blocks from `start` on stop being whole.

    Those are gone over first, by a loop without masks for tokens, which are up to a fifth of the
    instructions; a second loop, of one block at most, has them.
    """
    return start + tl.maximum(end - start, 0) // BLOCK * BLOCK


@triton.jit
def token_mask(o_n, end, WHOLE: tl.constexpr):
    """Which tokens of a block are before `end`."""
    if WHOLE:
        return tl.full(o_n.shape, True, tl.int1)
    else:
        return o_n < end


@triton.jit
def tile_mask(rows, first, X: tl.constexpr, WIDTH: tl.constexpr, XB: tl.constexpr):
    return rows[:, None] & column_mask(first, X, WIDTH, XB)[None, :]


@triton.jit
def column_mask(first, X: tl.constexpr, WIDTH: tl.constexpr, XB: tl.constexpr):
    """Which of the columns from `first` on are among X, and in a tile that ends where XB begins."""
    column = tl.arange(0, WIDTH)
    inside = first + column < X
    if XB < WIDTH:
        inside = inside & (column < XB)
    return inside

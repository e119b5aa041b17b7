"""Where the tokens of a window lie, and what attention between them adds to its logits.

The rows and columns of a grid are read from `shift` on, around its end, and cut into windows of
WH x WW = T tokens. Windows at the end go beyond the grid. A tile is of `BLOCK` >= T tokens, and
those from T on are none.
"""

import triton
import triton.language as tl


@triton.jit
def tokens_of(
    i_w, rows, columns, across, turn_r, turn_c,
    WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a picture's window `i_w`: its tokens' numbers in the grid, and which are there.

    turn: what the shift is around the end of the grid.
    """
    o_t = tl.arange(0, BLOCK)
    o_r = i_w // across * WH + o_t // WW
    o_c = i_w % across * WW + o_t % WW
    there = (o_t < WH * WW) & (o_r < rows) & (o_c < columns)
    o_r += turn_r
    o_c += turn_c
    o_r = tl.where(o_r < rows, o_r, o_r - rows)
    o_c = tl.where(o_c < columns, o_c, o_c - columns)
    return tl.cast(o_r, tl.int64) * columns + o_c, there


@triton.jit
def bias_of(
    table, heads, i_w, down, across, shift_r, shift_c,
    WH: tl.constexpr, WW: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) of a window: a number for how far apart two tokens are, and the mask.

    It is -100 for tokens from opposite sides of the grid, and -inf for keys that are none.

    table: of the head, `((2 WH - 1) (2 WW - 1),)`; between its numbers are those of other heads.
    """
    o_q, o_k = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    o_n = (o_q // WW - o_k // WW + WH - 1) * (2 * WW - 1) + o_q % WW - o_k % WW + WW - 1
    T: tl.constexpr = WH * WW
    bias = tl.load(table + o_n * heads, mask=(o_q < T) & (o_k < T), other=0.0).to(tl.float32)
    if SHIFTED:
        first_r, first_c = i_w // across * WH, i_w % across * WW
        turned_r, turned_c = down * WH - shift_r - first_r, across * WW - shift_c - first_c
        apart = (o_q // WW >= turned_r) != (o_k // WW >= turned_r)
        apart |= (o_q % WW >= turned_c) != (o_k % WW >= turned_c)
        bias = tl.where(apart, bias - 100.0, bias)
    return tl.where(o_k < T, bias, float("-inf"))


@triton.jit
def load_heads(p, there, fill, inside, FILLED: tl.constexpr):
    """(BLOCK, D) of a head; tokens beyond the grid are as `fill` if `FILLED`, or zeros."""
    x = tl.load(p, mask=there[:, None] & inside, other=0.0)
    if FILLED:
        # Again for every window: kept, it takes registers that there are not.
        beyond = tl.load(fill, mask=inside, other=0.0).to(x.dtype)
        x = tl.where(there[:, None], x, beyond)
    return x


@triton.jit
def weights_of(q, k, bias, scale, PRECISION: tl.constexpr):
    """exp of the logits less their largest, and its sums over keys."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p, tl.sum(p, 1)

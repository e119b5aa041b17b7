"""The feature map of focused linear attention, which looks at all heads of a token at once.

    x^ = (relu(x) + 1e-6) * c        u = x^ t        f(x) = w u^p

t = 1 / max x^ and w = ||x^|| / ||u^p|| are what all heads of a token share: `focus_rows_kernel`
finds them, then f is elementwise. It finds ||u||^2 too, for the gradient.

Heads that lie side by side in memory are read as one head with many channels. A head is gone
through in chunks of WIDTH channels.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .masks import key_rows
from .memory import Axes, Layout
from .shift import shifted
from .tiles import head_offset, tile_offset, token_offset
from .tiling import Tiling


@triton.jit
def focused(x, columns, t, w, POWER: tl.constexpr):
    """f of a tile in the accumulation type; columns: c of its channels, None where it is 1."""
    x = positive(x)
    if columns is not None:
        x *= columns[None, :]
    return power(x * t[:, None], POWER) * w[:, None]


@triton.jit
def positive(x):
    # NaN passes through, as it does in torch.relu.
    zero, offset = tl.full((), 0.0, x.dtype), tl.full((), 1e-6, x.dtype)
    return tl.maximum(x, zero, propagate_nan=tl.PropagateNan.ALL) + offset


@triton.jit
def power(u, POWER: tl.constexpr):
    """u^POWER for u >= 0."""
    if POWER == 0.0:
        return tl.full(u.shape, 1.0, u.dtype)
    elif POWER == 1.0:
        return u
    elif POWER == 2.0:
        return u * u
    elif POWER == 3.0:
        return u * u * u
    else:
        return tl.exp2(tl.log2(u) * tl.full((), POWER, u.dtype))


@triton.jit
def binade(x, INVERSE: tl.constexpr):
    """The largest power of two that is not above x, or its inverse."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        if INVERSE:
            bits = 0x7FE0000000000000 - bits
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
        if INVERSE:
            bits = 0x7F000000 - bits
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def chunk_offset(
    i, stride_h, stride_d, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    ORDER: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Elements from a token's start to its chunk `i`, counted over all heads."""
    heads = (i // CHUNKS) * tl.cast(stride_h, tl.int64)
    first = (i % CHUNKS) * WIDTH
    if ORDER == "head_dim":
        return heads * UNIT + first
    elif ORDER == "tokens":
        return (heads + first * stride_d.to(tl.int64)) * UNIT
    else:
        return heads + first * stride_d.to(tl.int64)


@triton.jit
def chunk_channels(i, K: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Where the channels of a chunk lie in `(H, K)`, and which of them there are."""
    channel = (i % CHUNKS) * WIDTH + tl.arange(0, WIDTH)
    return (i // CHUNKS) * K + channel, channel < K


@triton.jit
def load_factors(columns, o_c, inside, ROWS: tl.constexpr, ACC: tl.constexpr):
    """c of a chunk's channels, 0 where there are none."""
    if columns is None:
        return tl.where(inside, 1.0, 0.0).to(ACC)[None, :]
    else:
        # As a tile, of which every thread loads what it needs. A row would be spread over them,
        # and exchanged through shared memory.
        p_c = tl.broadcast_to(columns + o_c[None, :], (ROWS, o_c.shape[0]))
        return tl.load(p_c, mask=inside[None, :], other=0.0)


@triton.jit
def apart(products, there):
    """The products, not to be fused into a sum by one thread and not by another: see below."""
    return tl.where(there, products, 0.0)


@kernel
def focus_rows_kernel(
    x, shift, columns, mask, rows,
    stride_xb: "i64", stride_xh: "i64", stride_xn: "i64", stride_xd: "i64",
    stride_mb: "i64", stride_mn: "i64",
    H: "i32", N: "i32", blocks: "i32",
    K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, ORDER: tl.constexpr, UNIT: tl.constexpr,
    POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_n = tl.program_id(0) % blocks * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if mask is not None:
        mask += i_b * stride_mb
    m_x = key_rows(mask, o_n, m_n, stride_mn)
    x += head_offset(i_b, 0, stride_xb, stride_xh, ORDER, UNIT)
    x += token_offset(i_n, stride_xn, ORDER, UNIT)
    o_x = tile_offset(stride_xn, stride_xd, 0, BLOCK_N, WIDTH, ORDER, UNIT)

    # Every group of channels, which one thread holds, has a largest x^ and sums of its own: x is
    # read once, and no thread waits for another. The sums are of x^ over the binade of the largest:
    # that is exact, so that they belong to t as it is rounded.
    top = tl.full((BLOCK_N, WIDTH // GROUP), 1.2e-38, ACC)
    squares = tl.zeros((BLOCK_N, WIDTH // GROUP), ACC)
    powers = tl.zeros((BLOCK_N, WIDTH // GROUP), ACC)
    for i in range(0, H * CHUNKS):
        p_x = x + chunk_offset(i, stride_xh, stride_xd, CHUNKS, WIDTH, ORDER, UNIT) + o_x
        o_c, inside = chunk_channels(i, K, CHUNKS, WIDTH)
        m_c = m_x[:, None] & inside[None, :]
        b_x = shifted(tl.load(p_x, mask=m_c, other=0.0), shift, o_n, o_c, H * K, m_c)
        b_x = positive(b_x.to(ACC)) * load_factors(columns, o_c, inside, BLOCK_N, ACC)
        b_x = tl.reshape(b_x, (BLOCK_N, WIDTH // GROUP, GROUP))
        before = binade(top, False)
        top = tl.maximum(top, tl.max(b_x, 2))
        scale = binade(top, True)
        shrink = before * scale
        b_u = b_x * scale[:, :, None]
        squares = squares * (shrink * shrink) + tl.sum(apart(b_u * b_u, m_n[:, None, None]), 2)
        shrink, b_u = power(shrink, POWER), power(b_u, POWER)
        powers = powers * (shrink * shrink) + tl.sum(apart(b_u * b_u, m_n[:, None, None]), 2)

    before = binade(top, False)
    top = tl.max(top, 1)
    t = 1.0 / top
    shrink = before * t[:, None]
    squares = tl.sum(apart(squares * (shrink * shrink), m_n[:, None]), 1)
    shrink = power(shrink, POWER)
    powers = tl.sum(apart(powers * (shrink * shrink), m_n[:, None]), 1)
    rows += i_b * 3 * N + o_n
    tl.store(rows, t, mask=m_n)
    tl.store(rows + N, top * tl.sqrt(squares / powers), mask=m_n)
    tl.store(rows + 2 * N, squares, mask=m_n)


def merged(*tensors: Axes) -> tuple[Axes, ...]:
    """The tensors with all heads as channels of one, where they lie so in memory."""
    if any(x.stride[1] != x.shape[3] * x.stride[3] for x in tensors):
        return tensors
    return tuple(
        Axes((x.shape[0], 1, x.shape[2], x.shape[1] * x.shape[3]), (x.stride[0], 0, *x.stride[2:]))
        for x in tensors
    )


def tile(K: int, itemsize: int, order: str) -> tuple[int, int]:
    """(tokens, channels) of a tile: 4 KiB, two 16-byte accesses for each of 128 threads.

    Where tokens lie side by side, not fewer of them than fill the lines.
    """
    widest = 32 if order == "tokens" else 256
    widths = [width for width in (256, 128, 64, 32) if width <= widest]
    width = next((w for w in widths if 8 * w * triton.cdiv(K, w) <= 9 * K), 16)
    return 4096 // itemsize // width, width


@lru_cache(maxsize=1024)
def plan_focus_rows(
    x: Axes, mask: tuple[int, ...], dtype: torch.dtype, focusing_factor: float
) -> Launch:
    (x,) = merged(x)
    B, H, N, K = x.shape
    layout = Layout.of(dtype.itemsize, x)
    block, width = tile(K, dtype.itemsize, layout.orders[0])
    blocks = triton.cdiv(N, block)
    return Launch(
        focus_rows_kernel,
        (B * blocks, 1),
        (*layout.strides, *mask, H, N, blocks),
        {
            "K": K,
            "BLOCK_N": block,
            "CHUNKS": triton.cdiv(K, width),
            "WIDTH": width,
            "GROUP": 16 // dtype.itemsize,
            "ORDER": layout.orders[0],
            "UNIT": layout.unit,
            "POWER": float(focusing_factor),
            "ACC": Tiling.acc(dtype),
        },
        # The threads that share a token each add up its sums. With products fused into additions
        # those would differ in the last bit, and any one of them be stored. Some Inductors drop the
        # option: there it is `apart` alone that prevents it.
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
    )


def launch_focus_rows(
    x: torch.Tensor,
    columns: torch.Tensor | None,
    mask: torch.Tensor | None,
    power: float,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """t, w and ||u||^2 `(B, 3, N)` of x `(B, H, N, K)`, in the type of sums.

    columns: c `(H, K)`, contiguous, in that type too; None where it is 1. mask: `(B, N)` in the
    dtype of x, 0 where x is to be read as 0. power: at most 60, for the sums of squares of u^p.
    shift: `(N, H, K)`, contiguous, in the dtype of x, which it is added to.
    """
    launch = plan_focus_rows(
        Axes(x.shape, x.stride()), (0, 0) if mask is None else mask.stride(), x.dtype, power
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.new_empty(x.shape[0], 3, x.shape[2], dtype=dtype)
    launch(x, shift, columns, mask, rows)
    return rows

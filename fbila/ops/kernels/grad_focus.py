"""The gradient through the feature map of focused linear attention, from f df to dx.

With x^, u, t, w and f as in `focus.py`, a = w t and D = f . df over all heads of a token,

    dx^ = p (f / x^) (df - f D / ||x^||^2) + x^ D / ||x^||^2

df itself is large where f is small, and may leave float16's range: m = f df, elementwise, is what
the kernel is given, and D is its sum. With s = D / ||u||^2 all terms of

    x^ dx^ = p m + s u^2 - p a^2 s u^(2 p)

are of the size of m, whatever the size of x. Then dx = x^ dx^ / (relu(x) + 1e-6) where x > 0, and
dc is the sum of x^ dx^ / c over tokens.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .focus import chunk_channels, chunk_offset, merged, positive, power, tile
from .launch import Launch, kernel
from .masks import key_rows
from .memory import Axes, Layout
from .shift import shifted
from .tiles import head_offset, tile_offset, token_offset
from .tiling import ENOUGH_PROGRAMS, Tiling

STAGES = 3


@triton.jit
def reciprocal(x):
    """1 / x for x > 0. In float32 by rsqrt: one instruction, where a division takes ten."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@kernel
def grad_focus_kernel(
    x, df, shift, columns, rows, along, mask, partial,
    stride_xb: "i64", stride_xh: "i64", stride_xn: "i64", stride_xd: "i64",
    stride_gb: "i64", stride_gh: "i64", stride_gn: "i64", stride_gd: "i64",
    stride_mb: "i64", stride_mn: "i64",
    H: "i32", N: "i32", run: "i32", runs: "i32",
    K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    ORDER_X: tl.constexpr, ORDER_G: tl.constexpr, UNIT: tl.constexpr, SAME: tl.constexpr,
    POWER: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Chunks are fastest: programs that run at one time share lines of the memory.
    i_c, i_run = tl.program_id(0) % (H * CHUNKS), tl.program_id(0) // (H * CHUNKS)
    i_b = (i_run // runs).to(tl.int64)
    if mask is not None:
        mask += i_b * stride_mb
    rows += i_b * 3 * N
    along += i_b * N
    x += head_offset(i_b, 0, stride_xb, stride_xh, ORDER_X, UNIT)
    x += chunk_offset(i_c, stride_xh, stride_xd, CHUNKS, WIDTH, ORDER_X, UNIT)
    df += head_offset(i_b, 0, stride_gb, stride_gh, ORDER_G, UNIT)
    df += chunk_offset(i_c, stride_gh, stride_gd, CHUNKS, WIDTH, ORDER_G, UNIT)
    o_x = tile_offset(stride_xn, stride_xd, 0, BLOCK_N, WIDTH, ORDER_X, UNIT)
    o_g = o_x if SAME else tile_offset(stride_gn, stride_gd, 0, BLOCK_N, WIDTH, ORDER_G, UNIT)
    o_c, inside = chunk_channels(i_c, K, CHUNKS, WIDTH)
    if columns is not None:
        b_c = tl.load(columns + o_c, mask=inside, other=1.0)

    total = tl.zeros((BLOCK_N, WIDTH), ACC)
    start = i_run % runs * run
    # Asynchronous copies of the next blocks: of plain loads, the compiler puts off those of a
    # thread's later rows until the first are done with.
    for i_n in tl.range(start, tl.minimum(start + run, N), BLOCK_N, num_stages=STAGES):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m_x = key_rows(mask, o_n, m_n, stride_mn)
        m_c = m_x[:, None] & inside[None, :]
        p_g = df + token_offset(i_n, stride_gn, ORDER_G, UNIT) + o_g
        b_x = tl.load(x + token_offset(i_n, stride_xn, ORDER_X, UNIT) + o_x, mask=m_c, other=0.0)
        b_x = shifted(b_x, shift, o_n, o_c, H * K, m_c)
        b_h = tl.load(p_g, mask=m_c, other=0.0).to(ACC)
        # With s = 0, tokens that are masked give nothing.
        b_t = tl.load(rows + o_n, mask=m_n, other=0.0)
        b_w = tl.load(rows + N + o_n, mask=m_n, other=0.0)
        b_s = tl.load(along + o_n, mask=m_x, other=0.0)
        b_s /= tl.load(rows + 2 * N + o_n, mask=m_n, other=1.0)
        b_a = b_w * b_t
        back = b_a * b_a * b_s * POWER

        b_x = b_x.to(ACC)
        b_p = positive(b_x)
        b_u = b_p
        if columns is not None:
            b_u *= b_c[None, :]
        b_u *= b_t[:, None]
        b_u *= b_u
        b_h = b_h * POWER + b_u * b_s[:, None] - power(b_u, POWER) * back[:, None]
        if partial is not None:
            total += b_h
        # A NaN in x leaves relu's gradient as it is, as in PyTorch.
        dx = tl.where(b_x <= 0, 0.0, b_h * reciprocal(b_p))
        tl.store(p_g, dx.to(df.dtype.element_ty), mask=m_n[:, None] & inside[None, :])

    if partial is not None:
        partial += i_run.to(tl.int64) * H * K + o_c
        tl.store(partial, tl.sum(total, 0) / b_c, mask=inside)


@lru_cache(maxsize=1024)
def plan_grad_focus(
    x: Axes, df: Axes, mask: tuple[int, ...], dtype: torch.dtype, focusing_factor: float
) -> tuple[Launch, int]:
    """(launch, rows of the partial sums)."""
    x, df = merged(x, df)
    B, H, N, K = x.shape
    layout = Layout.of(dtype.itemsize, x, df)
    block, width = tile(K, dtype.itemsize, layout.orders[0])
    chunks, blocks = triton.cdiv(K, width), triton.cdiv(N, block)
    # Every program has sums of its own, which are read again: not more of them than needed.
    run = max(1, B * blocks * H * chunks // (4 * ENOUGH_PROGRAMS))
    runs = triton.cdiv(blocks, run)
    launch = Launch(
        grad_focus_kernel,
        (B * runs * H * chunks, 1),
        (*layout.strides, *mask, H, N, run * block, runs),
        {
            "K": K,
            "BLOCK_N": block,
            "CHUNKS": chunks,
            "WIDTH": width,
            "ORDER_X": layout.orders[0],
            "ORDER_G": layout.orders[1],
            "UNIT": layout.unit,
            "SAME": layout.same,
            "POWER": float(focusing_factor),
            "ACC": Tiling.acc(dtype),
            "STAGES": STAGES,
        },
        {"num_warps": 4, "num_stages": STAGES},
    )
    return launch, B * runs


def launch_focus_gradient(
    x: torch.Tensor,
    df: torch.Tensor,
    columns: torch.Tensor | None,
    rows: torch.Tensor,
    along: torch.Tensor,
    mask: torch.Tensor | None,
    power: float,
    shift: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Overwrite df, the gradient of f(x) times f(x), with that of x; return that of `columns`.

    The latter as parts `(programs, H, K)`, which are to be added up.

    rows: of `launch_focus_rows`, with the same columns, mask, power and shift. along: `(B, N)`,
    contiguous and in the type of rows, the sum of df over heads and channels as it is given. Tokens
    that are masked get 0 and give nothing, whatever df and `along` hold for them.
    """
    launch, programs = plan_grad_focus(
        Axes(x.shape, x.stride()),
        Axes(df.shape, df.stride()),
        (0, 0) if mask is None else mask.stride(),
        x.dtype,
        power,
    )
    if columns is None:
        launch(x, df, shift, columns, rows, along, mask, None)
        return None
    partial = columns.new_empty(programs, *columns.shape)
    launch(x, df, shift, columns, rows, along, mask, partial)
    return partial

"""What every kernel does with tiles: where they lie, loading, storing, and tensor-core operands.

A head dim is covered by one or two tiles whose widths are powers of two (40 = 32 + 16, the last
masked): `X0` and `X1`, with `X1 = 0` where one is enough. The second begins at column `XB`: at X0,
but at half of the head dim where its halves are rotated against each other. Functions on a pair
return the first tile twice where there is no second; the copy is never used.

`ORDER` says which axis of a tensor is contiguous: "head_dim", "tokens", or "any". For the first two
its other strides come in units of 16 bytes (`UNIT` elements), so that the compiler can prove the
alignment that 16-byte accesses need.
"""

import triton
import triton.language as tl

from .masks import column_mask, tile_mask


@triton.jit
def head_offset(i_b, i_h, stride_b, stride_h, ORDER: tl.constexpr, UNIT: tl.constexpr):
    """Elements from a tensor's start to the head (i_b, i_h), which are int64."""
    offset = i_b * stride_b + i_h * stride_h
    return offset if ORDER == "any" else offset * UNIT


@triton.jit
def token_offset(i_n, stride_n, ORDER: tl.constexpr, UNIT: tl.constexpr):
    """Elements from a head's start to its token `i_n`, a scalar."""
    if ORDER == "head_dim":
        return i_n * (tl.cast(stride_n, tl.int64) * UNIT)
    elif ORDER == "tokens":
        return i_n
    else:
        return i_n * tl.cast(stride_n, tl.int64)


@triton.jit
def tile_offset(
    stride_n, stride_d, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) offsets of a tile whose first column is `first`, from its first token."""
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    columns = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    if ORDER == "head_dim":
        return rows * (tl.cast(stride_n, tl.int64) * UNIT) + columns
    elif ORDER == "tokens":
        return rows + columns * (tl.cast(stride_d, tl.int64) * UNIT)
    else:
        return rows * stride_n + columns * stride_d


@triton.jit
def pair_offset(
    stride_n, stride_d, first, ROWS: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr,
    XB: tl.constexpr, ORDER: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The offsets of both tiles of a head dim, from column `first` on."""
    offset0 = tile_offset(stride_n, stride_d, first, ROWS, X0, ORDER, UNIT)
    offset1 = offset0
    if X1 > 0:
        offset1 = tile_offset(stride_n, stride_d, first + XB, ROWS, X1, ORDER, UNIT)
    return offset0, offset1


@triton.jit
def load_pair(
    pointer, offset0, offset1, rows, first, X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr,
    XB: tl.constexpr,
):  # fmt: skip
    """Both tiles of the columns from `first` up to X, zero beyond and outside `rows`."""
    x0 = tl.load(pointer + offset0, mask=tile_mask(rows, first, X, X0, XB), other=0.0)
    x1 = x0
    if X1 > 0:
        x1 = tl.load(pointer + offset1, mask=tile_mask(rows, first + XB, X, X1, X1), other=0.0)
    return x0, x1


@triton.jit
def store_pair(
    pointer, x0, x1, offset0, offset1, rows, first,
    X: tl.constexpr, X0: tl.constexpr, X1: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    dtype = pointer.dtype.element_ty
    tl.store(pointer + offset0, x0.to(dtype), mask=tile_mask(rows, first, X, X0, XB))
    if X1 > 0:
        tl.store(pointer + offset1, x1.to(dtype), mask=tile_mask(rows, first + XB, X, X1, X1))


@triton.jit
def mean_factor(factor, count, i_b, ACC: tl.constexpr):
    """What S and z are multiplied by: `factor`, or 1 / count where keys were masked."""
    if count is None:
        return tl.full((), factor, ACC)
    else:
        return 1.0 / tl.maximum(tl.load(count + i_b).to(ACC), 1.0)


@triton.jit
def state_offset(k, v, K0: tl.constexpr, V0: tl.constexpr, V: tl.constexpr):
    """Offsets of the (K0, V0) tile of S at row k and column v."""
    return (k + tl.arange(0, K0))[:, None] * V + (v + tl.arange(0, V0))[None, :]


@triton.jit
def load_state_tile(
    state, factor, k, v, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    """factor * S[k : k + K0, v : v + V0] in the accumulation type, zero outside (K, V)."""
    mask = column_mask(k, K, K0, KB)[:, None] & column_mask(v, V, V0, V0)[None, :]
    return tl.load(state + state_offset(k, v, K0, V0, V), mask=mask, other=0.0) * factor


@triton.jit
def load_state(
    state, factor, v, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """factor * S from column v on as `state_operands`."""
    s00 = load_state_tile(state, factor, 0, v, K, V, K0, V0, KB)
    s01, s10, s11 = s00, s00, s00
    if V1 > 0:
        s01 = load_state_tile(state, factor, 0, v + V0, K, V, K0, V1, KB)
    if K1 > 0:
        s10 = load_state_tile(state, factor, KB, v, K, V, K1, V0, K1)
    if K1 * V1 > 0:
        s11 = load_state_tile(state, factor, KB, v + V0, K, V, K1, V1, K1)
    return state_operands(s00, s01, s10, s11, K1, V1, dtype)


@triton.jit
def state_operands(s00, s01, s10, s11, K1: tl.constexpr, V1: tl.constexpr, dtype: tl.constexpr):
    """The tiles of S as operands, and the scale they stand for.

    float16 ends at 65504 and sinks into subnormals below 6e-5, and S and dS pass both ends in
    honest use, so there they are first brought to about 2^13 by a power of two, which is exact.
    """
    scale = tl.full((), 1.0, s00.dtype)
    if dtype == tl.float16:
        top = peak(s00)
        if V1 > 0:
            top = tl.maximum(top, peak(s01))
        if K1 > 0:
            top = tl.maximum(top, peak(s10))
        if K1 * V1 > 0:
            top = tl.maximum(top, peak(s11))
        scale = operand_scale(top)
        # Exact, and no division for every element.
        shrink = 1.0 / scale
        s00, s01, s10, s11 = s00 * shrink, s01 * shrink, s10 * shrink, s11 * shrink
    return s00.to(dtype), s01.to(dtype), s10.to(dtype), s11.to(dtype), scale


@triton.jit
def state_halves(s, dtype: tl.constexpr):
    """S as two operands and their scale: a product with both is one with S unrounded.

    That shows where phi(q) is not rounded either. Only with a denominator: where phi(q) is inf, the
    products are inf and -inf.
    """
    _, _, _, _, scale = state_operands(s, s, s, s, 0, 0, dtype)
    s *= 1.0 / scale
    high = s.to(dtype)
    # An inf stays one: inf - inf would be NaN.
    rest = tl.where(tl.abs(s) < float("inf"), s - high.to(s.dtype), 0.0)
    return high, rest.to(dtype), scale


@triton.jit
def store_state(
    pointer, s00, s01, s10, s11, v, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """Write the tiles of S from column v on."""
    store_state_tile(pointer, s00, 0, v, K, V, K0, V0, KB)
    if V1 > 0:
        store_state_tile(pointer, s01, 0, v + V0, K, V, K0, V1, KB)
    if K1 > 0:
        store_state_tile(pointer, s10, KB, v, K, V, K1, V0, K1)
    if K1 * V1 > 0:
        store_state_tile(pointer, s11, KB, v + V0, K, V, K1, V1, K1)


@triton.jit
def store_state_tile(
    pointer, tile, k, v, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, V0: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    mask = column_mask(k, K, K0, KB)[:, None] & column_mask(v, V, V0, V0)[None, :]
    tl.store(pointer + state_offset(k, v, K0, V0, V), tile, mask=mask)


@triton.jit
def load_key_sum(
    state, factor, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    """factor * z as two tiles; z lies behind S in the state's row."""
    mask = column_mask(0, K, K0, KB)
    z0 = tl.load(state + K * V + tl.arange(0, K0), mask=mask, other=0.0) * factor
    z1 = z0
    if K1 > 0:
        p_k = KB + tl.arange(0, K1)
        z1 = tl.load(state + K * V + p_k, mask=p_k < K, other=0.0) * factor
    return z0, z1


@triton.jit
def few_rows(x):
    """The sums of every 16th row of x: their threads have them, and keep fewer than all rows."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1])), 0)


@triton.jit
def column_operand(x, dtype: tl.constexpr):
    """x `(R,)` as a 16-bit `(R, 16)` operand and its scale: its columns add up to x.

    A product with it is a product with x in float32 precision, and costs the tensor cores less
    than a sum over rows costs the other units.
    """
    scale = tl.full((), 1.0, x.dtype)
    if dtype == tl.float16:
        size = tl.abs(x)
        scale = operand_scale(tl.max(tl.where(size < float("inf"), size, 0.0), 0))
        x *= 1.0 / scale
    high = x.to(dtype)
    x -= high.to(x.dtype)
    middle = x.to(dtype)
    low = (x - middle.to(x.dtype)).to(dtype)
    column = tl.arange(0, 16)[None, :]
    operand = tl.where(column == 2, low[:, None], tl.zeros((1, 16), dtype))
    operand = tl.where(column == 1, middle[:, None], operand)
    return tl.where(column == 0, high[:, None], operand), scale


@triton.jit
def store_key_sum(
    pointer, z0, z1, K: tl.constexpr, V: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    tl.store(pointer + K * V + tl.arange(0, K0), z0, mask=column_mask(0, K, K0, KB))
    if K1 > 0:
        p_k = KB + tl.arange(0, K1)
        tl.store(pointer + K * V + p_k, z1, mask=p_k < K)


@triton.jit
def peak(x):
    """The largest finite |x|: an inf must stay in its own column."""
    size = tl.abs(x)
    return tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)


@triton.jit
def row_peak(x0, x1, K1: tl.constexpr):
    """The largest |x| of each row of both tiles."""
    top = tl.max(tl.abs(x0), 1)
    if K1 > 0:
        top = tl.maximum(top, tl.max(tl.abs(x1), 1))
    return top


@triton.jit
def operand_scale(top):
    """The power of two that brings `top` to about 2^13, the middle of float16's range."""
    # The float32 exponent bits alone are the largest power of two not above top.
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 7.9e-31) * 0.0001220703125


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in the type of acc."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def scaled_product(a, b, acc, scale, PRECISION: tl.constexpr):
    """acc + scale a b; only float16 ever needs a scale other than 1."""
    if a.dtype == tl.float16:
        return acc + tl.dot(a, b, input_precision=PRECISION, out_dtype=acc.dtype) * scale
    else:
        return product(a, b, acc, PRECISION)

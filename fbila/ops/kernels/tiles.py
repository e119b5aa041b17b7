"""What every kernel does with a tile: load it, store it, and make a tensor-core operand of it."""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, rows, row_stride, columns, column_stride, row_mask, column_mask):
    """A (rows, columns) tile, zero outside the masks. Offsets are int64: strides may pass 2^31."""
    offsets = (
        rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    )
    return tl.load(pointer + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def store_tile(pointer, tile, rows, row_stride, columns, column_stride, row_mask, column_mask):
    offsets = (
        rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    )
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_state_tile(
    state, factor, i_k, i_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """factor * S[k-tile, v-tile] in the accumulation type, zero outside (K, V)."""
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (o_k < K)[:, None] & (o_v < V)[None, :]
    return tl.load(state + o_k[:, None] * V + o_v[None, :], mask=mask, other=0.0) * factor


@triton.jit
def load_key_sum(state, factor, i_k, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr):
    """factor * z[k-tile]; z lies behind S in the state's row."""
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.load(state + K * V + o_k, mask=o_k < K, other=0.0) * factor


@triton.jit
def to_operand(x, dtype: tl.constexpr):
    """Round `x` to the tensor cores' input type: returns (operand, scale), x ~ operand * scale.

    float16 ends at 65504 and sinks into subnormals below 6e-5, and S, dS or phi(q)/den pass both
    ends in honest use, so there the tile is first brought to about 2^13 by a power of two, which
    is exact. The peak is taken over finite elements: an inf must stay in its own column.
    """
    if dtype == tl.float16:
        size = tl.abs(x)
        peak = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
        # The float32 exponent bits alone are the largest power of two not above peak.
        power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.maximum(power, 7.9e-31) * 0.0001220703125
        return (x / scale).to(dtype), scale
    else:
        return x.to(dtype), 1.0

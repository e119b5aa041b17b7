"""The state of a set of keys, `S = sum_j phi(k_j)^T v_j` and `z = sum_j phi(k_j)`.

k `(B, H, M, K)`, v `(B, H, M, V)` -> state `(B * H, K * V + K)`, S row-major and then z.

The tokens are split over programs; each writes its partial sums, and a second kernel adds them in
a fixed order. There are no atomics, and the split depends on (M, K, V) alone, never on B or H: the
result is the same bit for bit from run to run and whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl

from .features import feature
from .memory import Layout
from .tiles import (
    head_offset,
    load_pair,
    pair_offset,
    product,
    store_key_sum,
    store_state,
    token_offset,
)
from .tiling import Tiling


@triton.jit(do_not_specialize=["H", "M", "chunk", "splits", "stride_kb", "stride_kh", "stride_km",
                               "stride_vb", "stride_vh", "stride_vm"])  # fmt: skip
def state_kernel(
    k, v, partial,
    stride_kb: "i64", stride_kh: "i64", stride_km: "i64", stride_kd,
    stride_vb: "i64", stride_vh: "i64", stride_vm: "i64", stride_vd,
    H, M, chunk, splits,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_K: tl.constexpr, ORDER_V: tl.constexpr, UNIT: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Heads fastest: where tokens hold their heads side by side, programs that run at one time
    # share the lines that a head's few bytes begin and end in.
    i_bsh = tl.program_id(0).to(tl.int64)
    i_b, i_s, i_h = i_bsh // H // splits, i_bsh // H % splits, i_bsh % H
    i_bh = i_b * H + i_h
    first_v = tl.program_id(1) * (V0 + V1)

    k += head_offset(i_b, i_h, stride_kb, stride_kh, ORDER_K, UNIT)
    v += head_offset(i_b, i_h, stride_vb, stride_vh, ORDER_V, UNIT)
    o_k0, o_k1 = pair_offset(stride_km, stride_kd, 0, BLOCK_M, K0, K1, ORDER_K, UNIT)
    o_v0, o_v1 = pair_offset(stride_vm, stride_vd, first_v, BLOCK_M, V0, V1, ORDER_V, UNIT)

    b_s00 = tl.zeros((K0, V0), dtype=ACC)
    # Kept two-dimensional until the end: one reduction over tokens instead of one a block.
    b_z0 = tl.zeros((BLOCK_M, K0), dtype=ACC)
    b_s01, b_s10, b_s11, b_z1 = b_s00, b_s00, b_s00, b_z0
    if V1 > 0:
        b_s01 = tl.zeros((K0, V1), dtype=ACC)
    if K1 > 0:
        b_s10 = tl.zeros((K1, V0), dtype=ACC)
        b_z1 = tl.zeros((BLOCK_M, K1), dtype=ACC)
    if K1 * V1 > 0:
        b_s11 = tl.zeros((K1, V1), dtype=ACC)

    start = i_s.to(tl.int32) * chunk
    end = tl.minimum(start + chunk, M)
    for i_m in range(start, end, BLOCK_M):
        m_m = i_m + tl.arange(0, BLOCK_M) < end
        p_k = k + token_offset(i_m, stride_km, ORDER_K, UNIT)
        p_v = v + token_offset(i_m, stride_vm, ORDER_V, UNIT)
        b_k0, b_k1 = load_pair(p_k, o_k0, o_k1, m_m, 0, K, K0, K1)
        b_v0, b_v1 = load_pair(p_v, o_v0, o_v1, m_m, first_v, V, V0, V1)
        # phi(0) is not 0 for every map, so rows beyond the end are cleared after it.
        b_f0 = tl.where(m_m[:, None], feature(b_k0.to(ACC), FEATURE_MAP), 0.0)
        b_a0 = tl.trans(b_f0.to(b_k0.dtype))
        b_s00 = product(b_a0, b_v0, b_s00, PRECISION)
        if V1 > 0:
            b_s01 = product(b_a0, b_v1, b_s01, PRECISION)
        if NORMALIZE:
            b_z0 += b_f0
        if K1 > 0:
            b_f1 = tl.where(m_m[:, None], feature(b_k1.to(ACC), FEATURE_MAP), 0.0)
            b_a1 = tl.trans(b_f1.to(b_k1.dtype))
            b_s10 = product(b_a1, b_v0, b_s10, PRECISION)
            if V1 > 0:
                b_s11 = product(b_a1, b_v1, b_s11, PRECISION)
            if NORMALIZE:
                b_z1 += b_f1

    partial += (i_bh * splits + i_s) * (K * V + K)
    store_state(partial, b_s00, b_s01, b_s10, b_s11, first_v, K, V, K0, K1, V0, V1)
    if tl.program_id(1) == 0:
        store_key_sum(partial, tl.sum(b_z0, 0), tl.sum(b_z1, 0), K, V, K0, K1)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(
    partial, state, splits, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    blocks = (SIZE + BLOCK - 1) // BLOCK
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, 8)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i_s in range(0, splits, 8):
        row = (i_bh * splits + i_s + o_s)[:, None] * SIZE + o[None, :]
        mask = (i_s + o_s < splits)[:, None] & (o < SIZE)[None, :]
        total += tl.sum(tl.load(partial + row, mask=mask, other=0.0), 0)
    tl.store(state + i_bh * SIZE + o, total, mask=o < SIZE)


def sum_splits(partial: torch.Tensor) -> torch.Tensor:
    """`(B * H, splits, size)` -> `(B * H, size)`, added in the order of the splits."""
    rows, splits, size = partial.shape
    if splits == 1:
        return partial.view(rows, size)
    state = partial.new_empty(rows, size)
    block = 512
    sum_splits_kernel[(rows * triton.cdiv(size, block),)](
        partial, state, splits, size, block, Tiling.acc(partial.dtype)
    )
    return state


def launch_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, normalize: bool
) -> torch.Tensor:
    """State `(B * H, K * V + K)` of k and v; z is 0 if not `normalize`."""
    B, H, M, K = k.shape
    V = v.shape[-1]
    tiling = Tiling.of("state", k.dtype, K, V)
    chunk, splits = tiling.split(M)
    partial = k.new_empty(B * H, splits, K * V + K, dtype=tiling.acc_dtype)
    layout = Layout.of(k, v)
    state_kernel[(B * H * splits, tiling.groups)](
        k, v, partial, *layout.strides, H, M, chunk, splits,
        K=K, V=V, BLOCK_M=tiling.block_tokens, **tiling.cover,
        ORDER_K=layout.orders[0], ORDER_V=layout.orders[1], UNIT=layout.unit,
        FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(k.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return sum_splits(partial)

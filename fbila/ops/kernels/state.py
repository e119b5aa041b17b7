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
from .tiles import load_tile
from .tiling import Tiling


@triton.jit(do_not_specialize=["M", "chunk", "splits"])
def state_kernel(
    k, v, partial,
    stride_kb, stride_kh, stride_km, stride_kd, stride_vb, stride_vh, stride_vm, stride_vd,
    H, M, chunk, splits,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bhs = tl.program_id(0).to(tl.int64)
    i_bh, i_s = i_bhs // splits, i_bhs % splits
    i_b, i_h = i_bh // H, i_bh % H
    tiles_v = (V + BLOCK_V - 1) // BLOCK_V
    i_k, i_v = tl.program_id(1) // tiles_v, tl.program_id(1) % tiles_v

    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < V

    b_kv = tl.zeros((BLOCK_K, BLOCK_V), dtype=ACC)
    # Kept two-dimensional until the end: one reduction over tokens instead of one a block.
    b_z = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    start = i_s.to(tl.int32) * chunk
    end = tl.minimum(start + chunk, M)
    for i_m in range(start, end, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        b_k = load_tile(k, o_m, stride_km, o_k, stride_kd, m_m, m_k)
        b_v = load_tile(v, o_m, stride_vm, o_v, stride_vd, m_m, m_v)
        # phi(0) is not 0 for every map, so rows beyond the end are cleared after it.
        b_f = tl.where(m_m[:, None], feature(b_k.to(ACC), FEATURE_MAP), 0.0)
        b_a = tl.trans(b_f.to(b_k.dtype))
        b_kv = tl.dot(b_a, b_v, b_kv, input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:
            b_z += b_f

    partial += i_bhs * (K * V + K)
    mask = m_k[:, None] & m_v[None, :]
    tl.store(partial + o_k[:, None] * V + o_v[None, :], b_kv, mask=mask)
    if i_v == 0:
        tl.store(partial + K * V + o_k, tl.sum(b_z, 0), mask=m_k)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(partial, state, splits, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                      ACC: tl.constexpr):  # fmt: skip
    blocks = (SIZE + BLOCK - 1) // BLOCK
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i_s in range(splits):
        total += tl.load(partial + (i_bh * splits + i_s) * SIZE + o, mask=o < SIZE, other=0.0)
    tl.store(state + i_bh * SIZE + o, total, mask=o < SIZE)


def sum_splits(partial: torch.Tensor) -> torch.Tensor:
    """`(B * H, splits, size)` -> `(B * H, size)`, added in the order of the splits."""
    rows, splits, size = partial.shape
    if splits == 1:
        return partial.view(rows, size)
    state = partial.new_empty(rows, size)
    block = 1024
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
    state_kernel[(B * H * splits, tiling.tiles_k * tiling.tiles_v)](
        k, v, partial, *k.stride(), *v.stride(), H, M, chunk, splits,
        K=K, V=V, BLOCK_M=tiling.block_tokens, BLOCK_K=tiling.block_k, BLOCK_V=tiling.block_v,
        FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(k.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return sum_splits(partial)

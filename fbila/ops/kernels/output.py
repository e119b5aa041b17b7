"""The query's half: `o_i = phi(q_i) S' / (phi(q_i) . z' + eps)`, or the numerator alone.

q `(B, H, N, K)`, state `(B * H, K * V + K)` -> o `(B, H, N, V)`. S' and z' are S and z times a
factor (1/M, or the scale), applied in the accumulation type before S' is rounded.
"""

import torch
import triton
import triton.language as tl

from .features import feature
from .tiles import load_key_sum, load_state_tile, load_tile, store_tile, to_operand
from .tiling import Tiling


@triton.jit(do_not_specialize=["N", "run", "runs"])
def output_kernel(
    q, state, o,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_ob, stride_oh, stride_on, stride_od,
    factor: "fp64", eps: "fp64",
    H, N, run, runs,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES_K: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bhr = tl.program_id(0).to(tl.int64)
    i_bh, i_r = i_bhr // runs, i_bhr % runs
    i_b, i_h = i_bh // H, i_bh % H
    i_v = tl.program_id(1)
    factor = tl.full((), factor, ACC)
    eps = tl.full((), eps, ACC)

    q += i_b * stride_qb + i_h * stride_qh
    o += i_b * stride_ob + i_h * stride_oh
    state += i_bh * (K * V + K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    dtype: tl.constexpr = q.dtype.element_ty

    if TILES_K == 1:
        b_s, s_scale = to_operand(
            load_state_tile(state, factor, 0, i_v, K, V, BLOCK_K, BLOCK_V), dtype
        )
        if NORMALIZE:
            b_z = load_key_sum(state, factor, 0, K, V, BLOCK_K)

    start = i_r.to(tl.int32) * run
    for i_n in range(start, tl.minimum(start + run, N), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_o = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACC)
        b_den = tl.zeros((BLOCK_N,), dtype=ACC) + eps
        for i_k in range(TILES_K):
            if TILES_K > 1:
                b_s, s_scale = to_operand(
                    load_state_tile(state, factor, i_k, i_v, K, V, BLOCK_K, BLOCK_V), dtype
                )
                if NORMALIZE:
                    b_z = load_key_sum(state, factor, i_k, K, V, BLOCK_K)
            o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
            b_q = load_tile(q, o_n, stride_qn, o_k, stride_qd, m_n, o_k < K)
            b_f = feature(b_q.to(ACC), FEATURE_MAP)
            b_o += tl.dot(b_f.to(dtype), b_s, input_precision=PRECISION, out_dtype=ACC) * s_scale
            if NORMALIZE:
                b_den += tl.sum(b_f * b_z[None, :], 1)
        if NORMALIZE:
            b_o = b_o / b_den[:, None]
        store_tile(o, b_o, o_n, stride_on, o_v, stride_od, m_n, m_v)


def launch_output(
    q: torch.Tensor,
    state: torch.Tensor,
    o: torch.Tensor,
    feature_map: str,
    normalize: bool,
    factor: float,
    eps: float,
) -> None:
    """Fill `o` from `q` and `state`; `factor` scales S and z, `eps` is added after."""
    B, H, N, K = q.shape
    V = o.shape[-1]
    tiling = Tiling.of("output", q.dtype, K, V)
    run, runs = tiling.run(B * H, N)
    output_kernel[(B * H * runs, tiling.tiles_v)](
        q, state, o, *q.stride(), *o.stride(), factor, eps, H, N, run, runs,
        K=K, V=V, BLOCK_N=tiling.block_tokens, BLOCK_K=tiling.block_k, BLOCK_V=tiling.block_v,
        TILES_K=tiling.tiles_k, FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(q.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip

"""Backward, the query's half: one pass over q and do gives dq and the state's gradient.

With o_i = n_i / d_i, n_i = phi(q_i) S' and d_i = phi(q_i) . z' + eps, let g_i = do_i S'^T. Then
do_i . n_i = phi(q_i) . g_i, so that neither o nor n is needed:

    dd_i      = -(phi(q_i) . g_i) / d_i^2
    dphi(q_i) = g_i / d_i + dd_i z'                    dq_i = dphi(q_i) * phi'(q_i)
    dS'       = sum_i (phi(q_i) / d_i)^T do_i          dz'  = sum_i dd_i phi(q_i)

1/d_i goes to phi(q_i), not to do_i, so that a row with phi(q_i) = 0 gives 0 and not 0 * inf.
Where a head is wider than a tile, each program owns one tile of dS' and goes over all tiles of q
and do for the two row scalars.
"""

import torch
import triton
import triton.language as tl

from .features import feature, feature_gradient
from .state import sum_splits
from .tiles import load_key_sum, load_state_tile, load_tile, store_tile, to_operand
from .tiling import Tiling


@triton.jit(do_not_specialize=["N", "chunk", "splits"])
def grad_query_kernel(
    q, do, state, dq, partial,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_ob, stride_oh, stride_on, stride_od,
    stride_gb, stride_gh, stride_gn, stride_gd,
    factor: "fp64", eps: "fp64",
    H, N, chunk, splits,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_K: tl.constexpr, TILES_V: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bhs = tl.program_id(0).to(tl.int64)
    i_bh, i_s = i_bhs // splits, i_bhs % splits
    i_b, i_h = i_bh // H, i_bh % H
    i_k, i_v = tl.program_id(1) // TILES_V, tl.program_id(1) % TILES_V
    factor = tl.full((), factor, ACC)
    eps = tl.full((), eps, ACC)

    q += i_b * stride_qb + i_h * stride_qh
    do += i_b * stride_ob + i_h * stride_oh
    dq += i_b * stride_gb + i_h * stride_gh
    state += i_bh * (K * V + K)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < V
    dtype: tl.constexpr = q.dtype.element_ty

    if TILES_K * TILES_V == 1:
        b_s, s_scale = to_operand(
            load_state_tile(state, factor, 0, 0, K, V, BLOCK_K, BLOCK_V), dtype
        )
    if NORMALIZE:
        b_z = load_key_sum(state, factor, i_k, K, V, BLOCK_K)

    b_ds = tl.zeros((BLOCK_K, BLOCK_V), dtype=ACC)
    b_dz = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    start = i_s.to(tl.int32) * chunk
    end = tl.minimum(start + chunk, N)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        b_q = load_tile(q, o_n, stride_qn, o_k, stride_qd, m_n, m_k)
        b_do = load_tile(do, o_n, stride_on, o_v, stride_od, m_n, m_v)

        b_den = tl.zeros((BLOCK_N,), dtype=ACC) + eps
        b_fg = tl.zeros((BLOCK_N,), dtype=ACC)
        if TILES_K * TILES_V == 1:
            b_g = tl.dot(b_do, tl.trans(b_s), input_precision=PRECISION, out_dtype=ACC) * s_scale
            # Never true; it puts q into the registers of the thread that holds the same element
            # of g, so that phi is computed once and the sums over K stay within a few threads.
            b_q = tl.where(b_g > float("inf"), 0.0, b_q)
            b_f = feature(b_q.to(ACC), FEATURE_MAP)
            if NORMALIZE:
                b_den += tl.sum(b_f * b_z[None, :], 1)
                b_fg += tl.sum(b_f * b_g, 1)
        else:
            b_f = feature(b_q.to(ACC), FEATURE_MAP)
            b_g = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
            # Without a denominator a program needs its own tile of g alone.
            first = 0 if NORMALIZE else i_k
            last = TILES_K if NORMALIZE else i_k + 1
            for j_k in range(first, last):
                c_g = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
                for j_v in range(TILES_V):
                    p_v = j_v * BLOCK_V + tl.arange(0, BLOCK_V)
                    c_do = load_tile(do, o_n, stride_on, p_v, stride_od, m_n, p_v < V)
                    c_s, c_scale = to_operand(
                        load_state_tile(state, factor, j_k, j_v, K, V, BLOCK_K, BLOCK_V), dtype
                    )
                    c_g += (
                        tl.dot(c_do, tl.trans(c_s), input_precision=PRECISION, out_dtype=ACC)
                        * c_scale
                    )
                b_g = tl.where(j_k == i_k, c_g, b_g)
                if NORMALIZE:
                    p_k = j_k * BLOCK_K + tl.arange(0, BLOCK_K)
                    c_q = load_tile(q, o_n, stride_qn, p_k, stride_qd, m_n, p_k < K)
                    c_f = feature(c_q.to(ACC), FEATURE_MAP)
                    c_z = load_key_sum(state, factor, j_k, K, V, BLOCK_K)
                    b_den += tl.sum(c_f * c_z[None, :], 1)
                    b_fg += tl.sum(c_f * c_g, 1)

        if NORMALIZE:
            # Rows beyond the end must add nothing, whatever their denominator.
            b_inv = tl.where(m_n, 1.0 / b_den, 0.0)
            b_dden = -(b_fg * b_inv) * b_inv
            b_a, a_scale = to_operand(b_f * b_inv[:, None], dtype)
            b_dz += b_f * b_dden[:, None]
            b_ds += tl.dot(tl.trans(b_a), b_do, input_precision=PRECISION, out_dtype=ACC) * a_scale
            b_g = b_g * b_inv[:, None] + b_dden[:, None] * b_z[None, :]
        else:
            b_a = tl.trans(b_f.to(dtype))
            b_ds = tl.dot(b_a, b_do, b_ds, input_precision=PRECISION, out_dtype=ACC)
        if i_v == 0:
            b_dq = feature_gradient(b_g, b_f, FEATURE_MAP)
            store_tile(dq, b_dq, o_n, stride_gn, o_k, stride_gd, m_n, m_k)

    partial += i_bhs * (K * V + K)
    mask = m_k[:, None] & m_v[None, :]
    tl.store(partial + o_k[:, None] * V + o_v[None, :], b_ds, mask=mask)
    if i_v == 0:
        tl.store(partial + K * V + o_k, tl.sum(b_dz, 0), mask=m_k)


def launch_grad_query(
    q: torch.Tensor,
    do: torch.Tensor,
    state: torch.Tensor,
    dq: torch.Tensor,
    feature_map: str,
    normalize: bool,
    factor: float,
    eps: float,
) -> torch.Tensor:
    """Fill `dq` and return the gradient `(B * H, K * V + K)` of the scaled state (S', z')."""
    B, H, N, K = q.shape
    V = do.shape[-1]
    tiling = Tiling.of("grad_query", q.dtype, K, V)
    chunk, splits = tiling.split(N)
    partial = q.new_empty(B * H, splits, K * V + K, dtype=tiling.acc_dtype)
    grad_query_kernel[(B * H * splits, tiling.tiles_k * tiling.tiles_v)](
        q, do, state, dq, partial, *q.stride(), *do.stride(), *dq.stride(),
        factor, eps, H, N, chunk, splits,
        K=K, V=V, BLOCK_N=tiling.block_tokens, BLOCK_K=tiling.block_k, BLOCK_V=tiling.block_v,
        TILES_K=tiling.tiles_k, TILES_V=tiling.tiles_v,
        FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(q.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return sum_splits(partial)

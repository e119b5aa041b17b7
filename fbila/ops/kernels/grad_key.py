"""Backward, the key's half: one pass over k and v gives dk and dv.

    dv_j      = phi(k_j) dS
    dphi(k_j) = v_j dS^T + dz         dk_j = dphi(k_j) * phi'(k_j)

dS and dz come scaled (the gradient of S' and z'); the factor that scaled S is applied here.
"""

import torch
import triton
import triton.language as tl

from .features import feature, feature_gradient
from .tiles import load_key_sum, load_state_tile, load_tile, store_tile, to_operand
from .tiling import Tiling


@triton.jit(do_not_specialize=["M", "run", "runs"])
def grad_key_kernel(
    k, v, dstate, dk, dv,
    stride_kb, stride_kh, stride_km, stride_kd, stride_vb, stride_vh, stride_vm, stride_vd,
    stride_fb, stride_fh, stride_fm, stride_fd, stride_gb, stride_gh, stride_gm, stride_gd,
    factor: "fp64",
    H, M, run, runs,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_K: tl.constexpr, TILES_V: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bhr = tl.program_id(0).to(tl.int64)
    i_bh, i_r = i_bhr // runs, i_bhr % runs
    i_b, i_h = i_bh // H, i_bh % H
    # Where a head is wider than a tile, program i_t makes the i_t-th tile of dk and of dv.
    i_t = tl.program_id(1)
    factor = tl.full((), factor, ACC)

    k += i_b * stride_kb + i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    dk += i_b * stride_fb + i_h * stride_fh
    dv += i_b * stride_gb + i_h * stride_gh
    dstate += i_bh * (K * V + K)
    o_k = i_t * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = i_t * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < V
    dtype: tl.constexpr = k.dtype.element_ty

    if TILES_K * TILES_V == 1:
        b_ds, ds_scale = to_operand(
            load_state_tile(dstate, factor, 0, 0, K, V, BLOCK_K, BLOCK_V), dtype
        )
    if NORMALIZE:
        b_dz = load_key_sum(dstate, factor, i_t, K, V, BLOCK_K)

    start = i_r.to(tl.int32) * run
    for i_m in range(start, tl.minimum(start + run, M), BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        b_k = load_tile(k, o_m, stride_km, o_k, stride_kd, m_m, m_k)
        b_f = feature(b_k.to(ACC), FEATURE_MAP)

        if TILES_K * TILES_V == 1:
            b_v = load_tile(v, o_m, stride_vm, o_v, stride_vd, m_m, m_v)
            b_dv = tl.dot(b_f.to(dtype), b_ds, input_precision=PRECISION, out_dtype=ACC) * ds_scale
            b_df = tl.dot(b_v, tl.trans(b_ds), input_precision=PRECISION, out_dtype=ACC) * ds_scale
        else:
            b_dv = tl.zeros((BLOCK_M, BLOCK_V), dtype=ACC)
            b_df = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
            for j_k in range(TILES_K):
                p_k = j_k * BLOCK_K + tl.arange(0, BLOCK_K)
                c_k = load_tile(k, o_m, stride_km, p_k, stride_kd, m_m, p_k < K)
                c_f = feature(c_k.to(ACC), FEATURE_MAP).to(dtype)
                c_ds, c_scale = to_operand(
                    load_state_tile(dstate, factor, j_k, i_t, K, V, BLOCK_K, BLOCK_V), dtype
                )
                b_dv += tl.dot(c_f, c_ds, input_precision=PRECISION, out_dtype=ACC) * c_scale
            for j_v in range(TILES_V):
                p_v = j_v * BLOCK_V + tl.arange(0, BLOCK_V)
                c_v = load_tile(v, o_m, stride_vm, p_v, stride_vd, m_m, p_v < V)
                c_ds, c_scale = to_operand(
                    load_state_tile(dstate, factor, i_t, j_v, K, V, BLOCK_K, BLOCK_V), dtype
                )
                b_df += (
                    tl.dot(c_v, tl.trans(c_ds), input_precision=PRECISION, out_dtype=ACC) * c_scale
                )
        if NORMALIZE:
            b_df += b_dz[None, :]
        b_dk = feature_gradient(b_df, b_f, FEATURE_MAP)
        store_tile(dk, b_dk, o_m, stride_fm, o_k, stride_fd, m_m, m_k)
        store_tile(dv, b_dv, o_m, stride_gm, o_v, stride_gd, m_m, m_v)


def launch_grad_key(
    k: torch.Tensor,
    v: torch.Tensor,
    dstate: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    feature_map: str,
    normalize: bool,
    factor: float,
) -> None:
    """Fill `dk` and `dv` from the gradient `dstate` of the scaled state."""
    B, H, M, K = k.shape
    V = v.shape[-1]
    tiling = Tiling.of("grad_key", k.dtype, K, V)
    run, runs = tiling.run(B * H, M)
    grad_key_kernel[(B * H * runs, max(tiling.tiles_k, tiling.tiles_v))](
        k, v, dstate, dk, dv, *k.stride(), *v.stride(), *dk.stride(), *dv.stride(),
        factor, H, M, run, runs,
        K=K, V=V, BLOCK_M=tiling.block_tokens, BLOCK_K=tiling.block_k, BLOCK_V=tiling.block_v,
        TILES_K=tiling.tiles_k, TILES_V=tiling.tiles_v,
        FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(k.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip

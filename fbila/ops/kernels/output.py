"""The query's half: `o_i = phi(q_i) S' / (phi(q_i) . z' + eps)`, or the numerator alone.

q `(B, H, N, K)`, state `(B * H, K * V + K)` -> o `(B, H, N, V)`. S' and z' are S and z times a
factor (1/M, or the scale), applied in the accumulation type before S' is rounded.
"""

import torch
import triton
import triton.language as tl

from .features import feature
from .memory import Layout
from .tiles import (
    head_offset,
    key_sum_operand,
    load_key_sum,
    load_pair,
    load_state,
    pair_offset,
    product,
    store_pair,
    token_offset,
)
from .tiling import Tiling


@triton.jit(do_not_specialize=["H", "N", "run", "runs", "stride_qb", "stride_qh", "stride_qn",
                               "stride_ob", "stride_oh", "stride_on"])  # fmt: skip
def output_kernel(
    q, state, o,
    stride_qb: "i64", stride_qh: "i64", stride_qn: "i64", stride_qd,
    stride_ob: "i64", stride_oh: "i64", stride_on: "i64", stride_od,
    factor: "fp64", eps: "fp64",
    H, N, run, runs,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_Q: tl.constexpr, ORDER_O: tl.constexpr, UNIT: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_brh = tl.program_id(0).to(tl.int64)
    i_b, i_r, i_h = i_brh // H // runs, i_brh // H % runs, i_brh % H
    i_bh = i_b * H + i_h
    first_v = tl.program_id(1) * (V0 + V1)
    factor = tl.full((), factor, ACC)
    eps = tl.full((), eps, ACC)

    q += head_offset(i_b, i_h, stride_qb, stride_qh, ORDER_Q, UNIT)
    o += head_offset(i_b, i_h, stride_ob, stride_oh, ORDER_O, UNIT)
    o_q0, o_q1 = pair_offset(stride_qn, stride_qd, 0, BLOCK_N, K0, K1, ORDER_Q, UNIT)
    o_o0, o_o1 = pair_offset(stride_on, stride_od, first_v, BLOCK_N, V0, V1, ORDER_O, UNIT)
    dtype: tl.constexpr = q.dtype.element_ty

    state += i_bh * (K * V + K)
    b_s00, b_s01, b_s10, b_s11, s_scale = load_state(
        state, factor, first_v, K, V, K0, K1, V0, V1, dtype
    )
    HALF: tl.constexpr = dtype.primitive_bitwidth == 16
    if NORMALIZE:
        b_z0, b_z1 = load_key_sum(state, factor, K, V, K0, K1)
        if HALF:
            b_c0, c_scale0 = key_sum_operand(b_z0, dtype)
            if K1 > 0:
                b_c1, c_scale1 = key_sum_operand(b_z1, dtype)

    start = i_r.to(tl.int32) * run
    for i_n in range(start, tl.minimum(start + run, N), BLOCK_N):
        m_n = i_n + tl.arange(0, BLOCK_N) < N
        p_q = q + token_offset(i_n, stride_qn, ORDER_Q, UNIT)
        p_o = o + token_offset(i_n, stride_on, ORDER_O, UNIT)
        b_q0, b_q1 = load_pair(p_q, o_q0, o_q1, m_n, 0, K, K0, K1)
        b_f0 = feature(b_q0.to(ACC), FEATURE_MAP)
        b_a0 = b_f0.to(dtype)
        b_o0 = product(b_a0, b_s00, tl.zeros((BLOCK_N, V0), dtype=ACC), PRECISION)
        b_o1 = b_o0
        if V1 > 0:
            b_o1 = product(b_a0, b_s01, tl.zeros((BLOCK_N, V1), dtype=ACC), PRECISION)
        if K1 > 0:
            b_f1 = feature(b_q1.to(ACC), FEATURE_MAP)
            b_a1 = b_f1.to(dtype)
            b_o0 = product(b_a1, b_s10, b_o0, PRECISION)
            if V1 > 0:
                b_o1 = product(b_a1, b_s11, b_o1, PRECISION)
        if NORMALIZE:
            if HALF:
                b_den = tl.sum(tl.dot(b_a0, b_c0, out_dtype=ACC), 1) * c_scale0 + eps
                if K1 > 0:
                    b_den += tl.sum(tl.dot(b_a1, b_c1, out_dtype=ACC), 1) * c_scale1
            else:
                b_den = tl.sum(b_f0 * b_z0[None, :], 1) + eps
                if K1 > 0:
                    b_den += tl.sum(b_f1 * b_z1[None, :], 1)
        if NORMALIZE:
            b_inv = s_scale / b_den
            b_o0, b_o1 = b_o0 * b_inv[:, None], b_o1 * b_inv[:, None]
        elif dtype == tl.float16:
            b_o0, b_o1 = b_o0 * s_scale, b_o1 * s_scale
        store_pair(p_o, b_o0, b_o1, o_o0, o_o1, m_n, first_v, V, V0, V1)


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
    layout = Layout.of(q, o)
    output_kernel[(B * H * runs, tiling.groups)](
        q, state, o, *layout.strides, factor, eps, H, N, run, runs,
        K=K, V=V, BLOCK_N=tiling.block_tokens, **tiling.cover,
        ORDER_Q=layout.orders[0], ORDER_O=layout.orders[1], UNIT=layout.unit,
        FEATURE_MAP=feature_map, NORMALIZE=normalize,
        ACC=Tiling.acc(q.dtype), PRECISION=tiling.precision,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip

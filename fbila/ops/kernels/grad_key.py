"""Backward, the key's half: one pass over k and v gives dk, dv and dw.

    dv_j      = w_j phi(k_j) dS
    dphi(k_j) = v_j dS^T + dz         dk_j = w_j dphi(k_j) * phi'(k_j)
                                      dw_j = dphi(k_j) . phi(k_j)

dS and dz come scaled (the gradient of S' and z'); the factor that scaled S is applied here. For
wide heads `output` makes dv, with k for queries, and `grad_feature` dk and dw. For `centre.py` what
each value gets of the gradient of their mean is added to dv, `share`.
"""

from functools import lru_cache

import torch
import triton.language as tl

from ..feature_maps import feature_dim
from .features import feature_gradients, features, load_channels, load_columns, store_channels
from .grad_feature import launch_grad_feature
from .launch import Launch, kernel
from .masks import column_mask, key_rows
from .memory import Axes, Layout
from .output import launch_output
from .programs import locate
from .rotary import load_table, rotate
from .shift import shifted_pair
from .side import Side, SidePlan
from .tiles import (
    head_offset,
    load_key_sum,
    load_pair,
    load_state,
    mean_factor,
    operand_scale,
    pair_offset,
    product,
    row_peak,
    store_pair,
    token_offset,
)
from .tiling import Tiling


@kernel
def grad_key_kernel(
    k, v, dstate, count, shift, weight, mask, table, rows, columns, cu, dk, dv, dweight, share,
    stride_kb: "i64", stride_kh: "i64", stride_km: "i64", stride_kd: "i64",
    stride_vb: "i64", stride_vh: "i64", stride_vm: "i64", stride_vd: "i64",
    stride_fb: "i64", stride_fh: "i64", stride_fm: "i64", stride_fd: "i64",
    stride_gb: "i64", stride_gh: "i64", stride_gm: "i64", stride_gd: "i64",
    stride_wb: "i64", stride_wh: "i64", stride_wm: "i64", stride_mb: "i64", stride_mm: "i64",
    stride_th: "i64", factor: "fp64",
    H: "i32", M: "i32", run: "i32", runs: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_K: tl.constexpr, ORDER_V: tl.constexpr, ORDER_F: tl.constexpr, ORDER_G: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, POWER: tl.constexpr, ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_x, start, end, _ = locate(cu, H, M, run, runs, GRAIN)
    factor = mean_factor(factor, count, i_x, ACC)
    if weight is not None:
        weight += i_b * stride_wb + i_h * stride_wh
    if dweight is not None:
        dweight += (i_b * H + i_h) * M
    if mask is not None:
        mask += i_b * stride_mb
    if table is not None:
        table += i_h * stride_th * K
    c_0, c_1 = load_columns(rows, columns, i_h, K, K0, K1, KB)
    if rows is not None:
        rows += i_b * 3 * M

    k += head_offset(i_b, i_h, stride_kb, stride_kh, ORDER_K, UNIT)
    v += head_offset(i_b, i_h, stride_vb, stride_vh, ORDER_V, UNIT)
    dk += head_offset(i_b, i_h, stride_fb, stride_fh, ORDER_F, UNIT)
    dv += head_offset(i_b, i_h, stride_gb, stride_gh, ORDER_G, UNIT)
    o_k0, o_k1 = pair_offset(stride_km, stride_kd, 0, BLOCK_M, K0, K1, KB, ORDER_K, UNIT)
    if SAME:
        o_v0, o_v1, o_f0, o_f1, o_g0, o_g1 = o_k0, o_k1, o_k0, o_k1, o_k0, o_k1
    else:
        o_v0, o_v1 = pair_offset(stride_vm, stride_vd, 0, BLOCK_M, V0, V1, V0, ORDER_V, UNIT)
        o_f0, o_f1 = pair_offset(stride_fm, stride_fd, 0, BLOCK_M, K0, K1, KB, ORDER_F, UNIT)
        o_g0, o_g1 = pair_offset(stride_gm, stride_gd, 0, BLOCK_M, V0, V1, V0, ORDER_G, UNIT)
    dtype: tl.constexpr = k.dtype.element_ty
    # As in `output_kernel`.
    BY_ROW: tl.constexpr = rows is not None and dtype == tl.float16

    dstate += (i_x * H + i_h) * (K * V + K)
    b_s00, b_s01, b_s10, b_s11, s_scale = load_state(
        dstate, factor, 0, K, V, K0, K1, KB, V0, V1, dtype
    )
    if NORMALIZE:
        b_z0, b_z1 = load_key_sum(dstate, factor, K, V, K0, K1, KB)
    if share is not None:
        share += (i_b * H + i_h) * V
        b_y0 = tl.load(share + tl.arange(0, V0), mask=column_mask(0, V, V0, V0), other=0.0)
        if V1 > 0:
            m_y = column_mask(V0, V, V1, V1)
            b_y1 = tl.load(share + V0 + tl.arange(0, V1), mask=m_y, other=0.0)

    for i_m in range(start, end, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        m_k = key_rows(mask, o_m, m_m, stride_mm)
        p_k = k + token_offset(i_m, stride_km, ORDER_K, UNIT)
        b_k0, b_k1 = load_channels(p_k, o_k0, o_k1, m_k, K, K0, K1, KB, FEATURE_MAP)
        b_k0, b_k1 = shifted_pair(b_k0, b_k1, shift, i_h, o_m, m_k, H, K, K0, K1, KB)
        p_v = v + token_offset(i_m, stride_vm, ORDER_V, UNIT)
        b_f0, b_f1 = features(b_k0, b_k1, rows, c_0, c_1, o_m, m_k, M, K1, FEATURE_MAP, POWER, ACC)
        b_a0, b_a1 = b_f0, b_f1
        if table is not None:
            b_t0, b_t1 = load_table(table, i_m, m_m, K, K0, K1, KB, BLOCK_M)
            b_a0, b_a1 = rotate(b_f0, b_f1, b_t0, b_t1, K1, ROTARY, False)
        if BY_ROW:
            b_row = operand_scale(row_peak(b_f0, b_f1, K1))
            b_a0, b_a1 = b_f0 * (1.0 / b_row)[:, None], b_f1 * (1.0 / b_row)[:, None]
        b_a0 = b_a0.to(dtype)
        b_dv0 = product(b_a0, b_s00, tl.zeros((BLOCK_M, V0), dtype=ACC), PRECISION)
        b_dv1 = b_dv0
        if V1 > 0:
            b_dv1 = product(b_a0, b_s01, tl.zeros((BLOCK_M, V1), dtype=ACC), PRECISION)
        if K1 > 0:
            b_a1 = b_a1.to(dtype)
            b_dv0 = product(b_a1, b_s10, b_dv0, PRECISION)
            if V1 > 0:
                b_dv1 = product(b_a1, b_s11, b_dv1, PRECISION)
        if dtype == tl.float16:
            b_dv0, b_dv1 = b_dv0 * s_scale, b_dv1 * s_scale
        if BY_ROW:
            b_dv0, b_dv1 = b_dv0 * b_row[:, None], b_dv1 * b_row[:, None]
        if weight is not None:
            b_w = tl.load(weight + o_m.to(tl.int64) * stride_wm, mask=m_k, other=0.0).to(ACC)
            b_dv0, b_dv1 = b_dv0 * b_w[:, None], b_dv1 * b_w[:, None]
        if mask is not None:
            b_dv0 = tl.where(m_k[:, None], b_dv0, 0.0)
            b_dv1 = tl.where(m_k[:, None], b_dv1, 0.0)
        if share is not None:
            b_dv0 += b_y0[None, :]
            if V1 > 0:
                b_dv1 += b_y1[None, :]
        p_g = dv + token_offset(i_m, stride_gm, ORDER_G, UNIT)
        store_pair(p_g, b_dv0, b_dv1, o_g0, o_g1, m_m, 0, V, V0, V1, V0)

        b_v0, b_v1 = load_pair(p_v, o_v0, o_v1, m_k, 0, V, V0, V1, V0)
        b_df0 = tl.zeros((BLOCK_M, K0), dtype=ACC)
        b_df0 = product(b_v0, tl.trans(b_s00), b_df0, PRECISION)
        if V1 > 0:
            b_df0 = product(b_v1, tl.trans(b_s01), b_df0, PRECISION)
        b_df1 = b_df0
        if K1 > 0:
            b_df1 = tl.zeros((BLOCK_M, K1), dtype=ACC)
            b_df1 = product(b_v0, tl.trans(b_s10), b_df1, PRECISION)
            if V1 > 0:
                b_df1 = product(b_v1, tl.trans(b_s11), b_df1, PRECISION)
        if dtype == tl.float16:
            b_df0, b_df1 = b_df0 * s_scale, b_df1 * s_scale
        if table is not None:
            b_df0, b_df1 = rotate(b_df0, b_df1, b_t0, b_t1, K1, ROTARY, True)
        if NORMALIZE:
            b_df0 += b_z0[None, :]
            if K1 > 0:
                b_df1 += b_z1[None, :]
        if dweight is not None:
            b_dw = tl.sum(b_f0 * b_df0, 1)
            if K1 > 0:
                b_dw += tl.sum(b_f1 * b_df1, 1)
            tl.store(dweight + o_m, tl.where(m_k, b_dw, 0.0), mask=m_m)
        if weight is not None:
            b_df0, b_df1 = b_df0 * b_w[:, None], b_df1 * b_w[:, None]
        b_dk0, b_dk1 = feature_gradients(b_df0, b_df1, b_f0, b_f1, K1, FEATURE_MAP)
        if mask is not None:
            b_dk0 = tl.where(m_k[:, None], b_dk0, 0.0)
            b_dk1 = tl.where(m_k[:, None], b_dk1, 0.0)
        p_f = dk + token_offset(i_m, stride_fm, ORDER_F, UNIT)
        store_channels(p_f, b_dk0, b_dk1, o_f0, o_f1, m_m, K, K0, K1, KB, FEATURE_MAP)


@lru_cache(maxsize=1024)
def plan_grad_key(
    k: Axes,
    v: Axes,
    dk: Axes,
    dv: Axes,
    side: SidePlan,
    dtype: torch.dtype,
    feature_map: str,
    normalize: bool,
    factor: float,
) -> Launch:
    B, H, M = k.shape[:3]
    K = feature_dim(k.shape[3], feature_map)
    V = v.shape[-1]
    tiling = Tiling.of("grad_key", dtype, K, V, side.rotary, feature_map)
    run, runs = tiling.run(B * H, M)
    programs = side.programs(B * H, H, M, run, runs)
    layout = Layout.of(dtype.itemsize, k, v, dk, dv)
    return Launch(
        grad_key_kernel,
        (programs, 1),
        (*layout.strides, *side.numbers, factor, H, M, run, side.sequences or runs),
        {
            "K": K,
            "V": V,
            "BLOCK_M": tiling.block_tokens,
            **tiling.cover,
            "ORDER_K": layout.orders[0],
            "ORDER_V": layout.orders[1],
            "ORDER_F": layout.orders[2],
            "ORDER_G": layout.orders[3],
            "UNIT": layout.unit,
            "SAME": layout.same and tiling.uniform,
            "GRAIN": layout.grain,
            "FEATURE_MAP": feature_map,
            "POWER": side.power,
            "ROTARY": side.rotary,
            "NORMALIZE": normalize,
            "ACC": Tiling.acc(dtype),
            "PRECISION": tiling.precision,
        },
        tiling.options,
    )


def launch_grad_key(
    k: torch.Tensor,
    v: torch.Tensor,
    dstate: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    side: Side,
    feature_map: str,
    normalize: bool,
    factor: float,
    *,
    count: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
) -> None:
    """Fill `dk`, `dv` and, with a weight, `dweight` `(B, H, M)` from the scaled state's gradient.

    `factor` and `count` are as for `launch_output`. Each row of dv has `share` `(B * H, V)` added.
    """
    K = feature_dim(k.shape[3], feature_map)
    if Tiling.of("grad_key", k.dtype, K, v.shape[3], side.rotary, feature_map).wide:
        launch_output(k, dstate, dv, feature_map, False, factor, 0.0, side=side, count=count)
        launch_grad_feature(
            k, v, dstate, dk, side, 1, feature_map, normalize, factor,
            count=count, dweight=dweight,
        )  # fmt: skip
        if share is not None:
            dv += share.view(*dv.shape[:2], 1, -1)
        return
    launch = plan_grad_key(
        Axes(k.shape, k.stride()),
        Axes(v.shape, v.stride()),
        Axes(dk.shape, dk.stride()),
        Axes(dv.shape, dv.stride()),
        side.plan,
        k.dtype,
        feature_map,
        normalize,
        factor,
    )
    launch(k, v, dstate, count, *side.tensors, dk, dv, dweight, share)

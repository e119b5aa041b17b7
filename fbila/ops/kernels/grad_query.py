"""Backward, the query's half: one pass over q and do gives dq and the state's gradient.

With o_i = n_i / d_i, n_i = phi(q_i) S' and d_i = phi(q_i) . z' + eps, let g_i = do_i S'^T. Then
do_i . n_i = phi(q_i) . g_i, so that neither o nor n is needed:

    dd_i      = -(phi(q_i) . g_i) / d_i^2
    dphi(q_i) = g_i / d_i + dd_i z'                    dq_i = dphi(q_i) * phi'(q_i)
    dS'       = sum_i (phi(q_i) / d_i)^T do_i          dz'  = sum_i dd_i phi(q_i)

1 / d_i comes from the forward pass. It goes to phi(q_i), not to do_i, so that a row with
phi(q_i) = 0 gives 0 and not 0 * inf. A wide head's dS' leaves no registers for the rest; there
`state` sums it, with q for keys and 1 / d_i for weights, and `grad_feature` makes dq and dz'.
"""

from functools import lru_cache

import torch
import triton.language as tl

from ..feature_maps import feature_dim
from .features import feature_gradients, features, load_channels, load_columns, store_channels
from .grad_feature import launch_grad_feature
from .launch import Launch, kernel
from .masks import token_mask, whole_blocks
from .memory import Axes, Layout
from .programs import locate
from .rotary import load_table, rotate
from .side import Side, SidePlan
from .state import launch_partial_state
from .sums import sum_partial
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
    scaled_product,
    store_key_sum,
    store_state,
    token_offset,
)
from .tiling import Tiling


@kernel
def grad_query_kernel(
    q, do, state, inverse, count, table, rows, columns, cu, dq, dweight, partial,
    stride_qb: "i64", stride_qh: "i64", stride_qn: "i64", stride_qd: "i64",
    stride_ob: "i64", stride_oh: "i64", stride_on: "i64", stride_od: "i64",
    stride_gb: "i64", stride_gh: "i64", stride_gn: "i64", stride_gd: "i64",
    stride_th: "i64", factor: "fp64",
    H: "i32", group: "i32", N: "i32", chunk: "i32", splits: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_Q: tl.constexpr, ORDER_O: tl.constexpr, ORDER_G: tl.constexpr, UNIT: tl.constexpr,
    SAME: tl.constexpr, GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, POWER: tl.constexpr, ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_x, start, end, row = locate(cu, H, N, chunk, splits, GRAIN)
    i_bh = i_b * H + i_h
    factor = mean_factor(factor, count, i_x, ACC)
    if table is not None:
        table += i_h * stride_th * K
    c_0, c_1 = load_columns(rows, columns, i_h, K, K0, K1, KB)
    if rows is not None:
        rows += i_b * 3 * N

    q += head_offset(i_b, i_h, stride_qb, stride_qh, ORDER_Q, UNIT)
    do += head_offset(i_b, i_h, stride_ob, stride_oh, ORDER_O, UNIT)
    dq += head_offset(i_b, i_h, stride_gb, stride_gh, ORDER_G, UNIT)
    o_q0, o_q1 = pair_offset(stride_qn, stride_qd, 0, BLOCK_N, K0, K1, KB, ORDER_Q, UNIT)
    if SAME:
        o_o0, o_o1, o_g0, o_g1 = o_q0, o_q1, o_q0, o_q1
    else:
        o_o0, o_o1 = pair_offset(stride_on, stride_od, 0, BLOCK_N, V0, V1, V0, ORDER_O, UNIT)
        o_g0, o_g1 = pair_offset(stride_gn, stride_gd, 0, BLOCK_N, K0, K1, KB, ORDER_G, UNIT)
    dtype: tl.constexpr = q.dtype.element_ty

    state += (i_x * (H // group) + i_h // group) * (K * V + K)
    b_s00, b_s01, b_s10, b_s11, s_scale = load_state(
        state, factor, 0, K, V, K0, K1, KB, V0, V1, dtype
    )
    if NORMALIZE:
        b_z0, b_z1 = load_key_sum(state, factor, K, V, K0, K1, KB)

    b_ds00 = tl.zeros((K0, V0), dtype=ACC)
    # Kept two-dimensional until the end: one reduction over tokens instead of one a block.
    b_dz0 = tl.zeros((BLOCK_N, K0), dtype=ACC)
    b_ds01, b_ds10, b_ds11, b_dz1 = b_ds00, b_ds00, b_ds00, b_dz0
    if V1 > 0:
        b_ds01 = tl.zeros((K0, V1), dtype=ACC)
    if K1 > 0:
        b_ds10 = tl.zeros((K1, V0), dtype=ACC)
        b_dz1 = tl.zeros((BLOCK_N, K1), dtype=ACC)
    if K1 * V1 > 0:
        b_ds11 = tl.zeros((K1, V1), dtype=ACC)

    whole = whole_blocks(start, end, BLOCK_N)
    for WHOLE in tl.static_range(1, -1, -1):
        first = start if WHOLE else whole
        last = whole if WHOLE else end
        for i_n in tl.range(first, last, BLOCK_N, num_stages=None if WHOLE else 1):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = token_mask(o_n, end, WHOLE)
            p_q = q + token_offset(i_n, stride_qn, ORDER_Q, UNIT)
            p_o = do + token_offset(i_n, stride_on, ORDER_O, UNIT)
            p_g = dq + token_offset(i_n, stride_gn, ORDER_G, UNIT)
            b_q0, b_q1 = load_channels(p_q, o_q0, o_q1, m_n, K, K0, K1, KB, FEATURE_MAP)
            b_do0, b_do1 = load_pair(p_o, o_o0, o_o1, m_n, 0, V, V0, V1, V0)

            b_g0 = tl.zeros((BLOCK_N, K0), dtype=ACC)
            b_g0 = product(b_do0, tl.trans(b_s00), b_g0, PRECISION)
            if V1 > 0:
                b_g0 = product(b_do1, tl.trans(b_s01), b_g0, PRECISION)
            # Never true; it puts q into the registers of the thread that holds the same element
            # of g, so that phi is computed once and the sums over K stay within a few threads.
            b_q0 = tl.where(b_g0 > float("inf"), 0.0, b_q0)
            b_g1 = b_g0
            if K1 > 0:
                b_g1 = tl.zeros((BLOCK_N, K1), dtype=ACC)
                b_g1 = product(b_do0, tl.trans(b_s10), b_g1, PRECISION)
                if V1 > 0:
                    b_g1 = product(b_do1, tl.trans(b_s11), b_g1, PRECISION)
                b_q1 = tl.where(b_g1 > float("inf"), 0.0, b_q1)
            b_f0, b_f1 = features(
                b_q0, b_q1, rows, c_0, c_1, o_n, m_n, N, K1, FEATURE_MAP, POWER, ACC
            )
            if dtype == tl.float16:
                b_g0, b_g1 = b_g0 * s_scale, b_g1 * s_scale

            a_scale = 1.0
            b_a0, b_a1 = b_f0, b_f1
            if table is not None:
                b_t0, b_t1 = load_table(table, i_n, m_n, K, K0, K1, KB, BLOCK_N)
                b_t0 = tl.where(b_g0 > float("inf"), 0.0, b_t0)
                if K1 > 0:
                    b_t1 = tl.where(b_g1 > float("inf"), 0.0, b_t1)
                b_a0, b_a1 = rotate(b_f0, b_f1, b_t0, b_t1, K1, ROTARY, False)
                b_g0, b_g1 = rotate(b_g0, b_g1, b_t0, b_t1, K1, ROTARY, True)
            if NORMALIZE:
                b_fg = tl.sum(b_f0 * b_g0, 1)
                if K1 > 0:
                    b_fg += tl.sum(b_f1 * b_g1, 1)
                # 0 beyond the end, where rows must add nothing.
                b_inv = tl.load(inverse + i_bh * N + o_n, mask=m_n, other=0.0)
                b_dden = -(b_fg * b_inv) * b_inv
                b_factor = b_inv
                if dtype == tl.float16:
                    # Where a row has an inf, b_inv is 0.
                    b_top = row_peak(b_a0, b_a1, K1) * tl.abs(b_inv)
                    b_top = tl.where(b_top < float("inf"), b_top, 0.0)
                    a_scale = operand_scale(tl.max(b_top, 0))
                    b_factor = b_inv * (1.0 / a_scale)
                    # Out of range only where phi(q) is 0, and its product with 1 / d.
                    beyond = (tl.abs(b_factor) == float("inf")) & (tl.abs(b_inv) < float("inf"))
                    b_factor = tl.where(beyond, 0.0, b_factor)
                b_a0, b_a1 = b_a0 * b_factor[:, None], b_a1 * b_factor[:, None]
                b_dz0 += b_f0 * b_dden[:, None]
                b_g0 = b_g0 * b_inv[:, None] + b_dden[:, None] * b_z0[None, :]
                if K1 > 0:
                    b_dz1 += b_f1 * b_dden[:, None]
                    b_g1 = b_g1 * b_inv[:, None] + b_dden[:, None] * b_z1[None, :]
            b_a0 = tl.trans(b_a0.to(dtype))
            b_ds00 = scaled_product(b_a0, b_do0, b_ds00, a_scale, PRECISION)
            if V1 > 0:
                b_ds01 = scaled_product(b_a0, b_do1, b_ds01, a_scale, PRECISION)
            if K1 > 0:
                b_a1 = tl.trans(b_a1.to(dtype))
                b_ds10 = scaled_product(b_a1, b_do0, b_ds10, a_scale, PRECISION)
                if V1 > 0:
                    b_ds11 = scaled_product(b_a1, b_do1, b_ds11, a_scale, PRECISION)

            if dweight is not None:
                b_dw = tl.sum(b_f0 * b_g0, 1)
                if K1 > 0:
                    b_dw += tl.sum(b_f1 * b_g1, 1)
                tl.store(dweight + i_bh * N + o_n, b_dw, mask=m_n)
            b_dq0, b_dq1 = feature_gradients(b_g0, b_g1, b_f0, b_f1, K1, FEATURE_MAP)
            store_channels(p_g, b_dq0, b_dq1, o_g0, o_g1, m_n, K, K0, K1, KB, FEATURE_MAP)

    partial += row * (K * V + K)
    store_state(partial, b_ds00, b_ds01, b_ds10, b_ds11, 0, K, V, K0, K1, KB, V0, V1)
    store_key_sum(partial, tl.sum(b_dz0, 0), tl.sum(b_dz1, 0), K, V, K0, K1, KB)


@lru_cache(maxsize=1024)
def plan_grad_query(
    q: Axes,
    do: Axes,
    dq: Axes,
    side: SidePlan,
    group: int,
    dtype: torch.dtype,
    feature_map: str,
    normalize: bool,
    factor: float,
) -> tuple[Launch, int, tuple[int, ...], torch.dtype]:
    """(launch, chunk, shape and dtype of the partial sums)."""
    B, H, N = q.shape[:3]
    K = feature_dim(q.shape[3], feature_map)
    V = do.shape[-1]
    tiling = Tiling.of("grad_query", dtype, K, V, side.rotary, feature_map)
    chunk, splits = tiling.split(N)
    programs = side.programs(B * H, H, N, chunk, splits)
    layout = Layout.of(dtype.itemsize, q, do, dq)
    launch = Launch(
        grad_query_kernel,
        (programs, 1),
        (*layout.strides, side.table, factor, H, group, N, chunk, side.sequences or splits),
        {
            "K": K,
            "V": V,
            "BLOCK_N": tiling.block_tokens,
            **tiling.cover,
            "ORDER_Q": layout.orders[0],
            "ORDER_O": layout.orders[1],
            "ORDER_G": layout.orders[2],
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
    rows = (programs // H, H) if side.sequences else (B, H, splits)
    return launch, chunk, (*rows, K * V + K), tiling.acc_dtype


def launch_grad_query(
    q: torch.Tensor,
    do: torch.Tensor,
    state: torch.Tensor,
    inverse: torch.Tensor | None,
    count: torch.Tensor | None,
    dq: torch.Tensor,
    side: Side,
    key_heads: int,
    feature_map: str,
    factor: float,
    dweight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill `dq` and return the gradient `(B * Hk, K * V + K)` of the scaled state (S', z').

    `inverse` `(B, H, N)` is what the forward pass wrote, or None without a denominator; `factor`
    and `count` are as for `launch_output`. `dweight` `(B, H, N)` is for phi(q) . dphi(q).
    """
    (_, H, N, _), V = q.shape, do.shape[-1]
    K = feature_dim(q.shape[3], feature_map)
    group = H // key_heads
    sums = key_heads, side.cu_seqlens
    if Tiling.of("grad_query", q.dtype, K, V, side.rotary, feature_map).wide:
        dstate = torch.empty_like(state)
        weighted = side._replace(weight=inverse)
        chunk, partial = launch_partial_state(q, do, weighted, feature_map, sum_keys=False)
        sum_partial(partial, *sums, chunk, N, dstate[:, : K * V])
        chunk, partial = launch_grad_feature(
            q, do, state, dq, side, group, feature_map, inverse is not None, factor,
            inverse=inverse, count=count, dweight=dweight,
        )  # fmt: skip
        if partial is not None:
            sum_partial(partial, *sums, chunk, N, dstate[:, K * V :])
        return dstate
    launch, chunk, shape, dtype = plan_grad_query(
        Axes(q.shape, q.stride()),
        Axes(do.shape, do.stride()),
        Axes(dq.shape, dq.stride()),
        side.plan,
        group,
        q.dtype,
        feature_map,
        inverse is not None,
        factor,
    )
    partial = q.new_empty(shape, dtype=dtype)
    launch(q, do, state, inverse, count, *side.tensors[3:], dq, dweight, partial)
    return sum_partial(partial, *sums, chunk, N)

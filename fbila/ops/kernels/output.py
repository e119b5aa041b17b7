"""The query's half: `o_i = phi(q_i) S' / (phi(q_i) . z' + eps)`, or the numerator alone.

q `(B, H, N, K)`, state `(B * Hk, K * V + K)` -> o `(B, H, N, V)`. S' and z' are S and z times a
factor (1/M, or the scale), applied in the accumulation type before S' is rounded. Where the
backward pass will need it, 1 / (phi(q_i) . z' + eps) is written too, one number a token and head.
With k for q and dS for S it makes dv of wide heads; `shift`, `weight` and `mask` are the keys'.
"""

from functools import lru_cache

import torch
import triton.language as tl

from ..feature_maps import feature_dim
from .features import features, load_channels, load_columns
from .launch import Launch, kernel
from .masks import key_rows, token_mask, whole_blocks
from .memory import Axes, Layout
from .programs import locate
from .rotary import load_table, rotate
from .shift import shifted_pair
from .side import PLAIN, Side, SidePlan
from .tiles import (
    column_operand,
    head_offset,
    load_key_sum,
    load_state,
    load_state_tile,
    mean_factor,
    operand_scale,
    pair_offset,
    product,
    row_peak,
    state_halves,
    store_pair,
    token_offset,
)
from .tiling import Tiling


@kernel
def output_kernel(
    q, state, o, inverse, count, shift, weight, mask, table, rows, columns, cu,
    stride_qb: "i64", stride_qh: "i64", stride_qn: "i64", stride_qd: "i64",
    stride_ob: "i64", stride_oh: "i64", stride_on: "i64", stride_od: "i64",
    stride_wb: "i64", stride_wh: "i64", stride_wn: "i64", stride_mb: "i64", stride_mn: "i64",
    stride_th: "i64",
    factor: "fp64", eps: "fp64",
    H: "i32", group: "i32", N: "i32", run: "i32", runs: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_Q: tl.constexpr, ORDER_O: tl.constexpr, UNIT: tl.constexpr, SAME: tl.constexpr,
    GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, POWER: tl.constexpr, ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr, MEAN: tl.constexpr, HALVES: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_x, start, end, _ = locate(cu, H, N, run, runs, GRAIN)
    first_v = tl.program_id(1) * (V0 + V1)
    factor = mean_factor(factor, count if MEAN else None, i_x, ACC)
    eps = tl.full((), eps, ACC)
    if count is not None:
        # No keys, no output: 0, not 0 / 0 where eps = 0.
        eps = tl.where(tl.load(count + i_x) == 0, 1.0, eps)
    if weight is not None:
        weight += i_b * stride_wb + i_h * stride_wh
    if mask is not None:
        mask += i_b * stride_mb
    if table is not None:
        table += i_h * stride_th * K
    c_0, c_1 = load_columns(rows, columns, i_h, K, K0, K1, KB)
    if rows is not None:
        rows += i_b * 3 * N

    q += head_offset(i_b, i_h, stride_qb, stride_qh, ORDER_Q, UNIT)
    o += head_offset(i_b, i_h, stride_ob, stride_oh, ORDER_O, UNIT)
    o_q0, o_q1 = pair_offset(stride_qn, stride_qd, 0, BLOCK_N, K0, K1, KB, ORDER_Q, UNIT)
    if SAME:
        o_o0, o_o1 = o_q0, o_q1
    else:
        o_o0, o_o1 = pair_offset(stride_on, stride_od, first_v, BLOCK_N, V0, V1, V0, ORDER_O, UNIT)
    dtype: tl.constexpr = q.dtype.element_ty
    HALF: tl.constexpr = (dtype == tl.float16) or (dtype == tl.bfloat16)
    # The focused map of a head may be below float16's range, where o is none the less of v's size.
    BY_ROW: tl.constexpr = rows is not None and dtype == tl.float16

    state += (i_x * (H // group) + i_h // group) * (K * V + K)
    if HALVES:
        b_s = load_state_tile(state, factor, 0, first_v, K, V, K0, V0, KB)
        b_s00, b_rest, s_scale = state_halves(b_s, dtype)
    else:
        b_s00, b_s01, b_s10, b_s11, s_scale = load_state(
            state, factor, first_v, K, V, K0, K1, KB, V0, V1, dtype
        )
    if NORMALIZE:
        b_z0, b_z1 = load_key_sum(state, factor, K, V, K0, K1, KB)
        if HALF:
            b_c0, c_scale0 = column_operand(b_z0, dtype)
            if K1 > 0:
                b_c1, c_scale1 = column_operand(b_z1, dtype)

    whole = whole_blocks(start, end, BLOCK_N)
    for WHOLE in tl.static_range(1, -1, -1):
        first = start if WHOLE else whole
        last = whole if WHOLE else end
        for i_n in tl.range(first, last, BLOCK_N, num_stages=None if WHOLE else 1):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = token_mask(o_n, end, WHOLE)
            p_q = q + token_offset(i_n, stride_qn, ORDER_Q, UNIT)
            p_o = o + token_offset(i_n, stride_on, ORDER_O, UNIT)
            b_q0, b_q1 = load_channels(p_q, o_q0, o_q1, m_n, K, K0, K1, KB, FEATURE_MAP)
            b_q0, b_q1 = shifted_pair(b_q0, b_q1, shift, i_h, o_n, m_n, H, K, K0, K1, KB)
            b_f0, b_f1 = features(
                b_q0, b_q1, rows, c_0, c_1, o_n, m_n, N, K1, FEATURE_MAP, POWER, ACC
            )
            b_r0, b_r1 = b_f0, b_f1
            if table is not None:
                b_t0, b_t1 = load_table(table, i_n, m_n, K, K0, K1, KB, BLOCK_N)
                b_r0, b_r1 = rotate(b_f0, b_f1, b_t0, b_t1, K1, ROTARY, False)
            if BY_ROW:
                b_row = operand_scale(row_peak(b_f0, b_f1, K1))
                b_f0, b_f1 = b_f0 * (1.0 / b_row)[:, None], b_f1 * (1.0 / b_row)[:, None]
                b_r0, b_r1 = b_f0, b_f1
            b_a0 = b_r0.to(dtype)
            b_o0 = tl.zeros((BLOCK_N, V0), dtype=ACC)
            if HALVES:
                b_o0 = product(b_a0, b_rest, b_o0, PRECISION)
            b_o0 = product(b_a0, b_s00, b_o0, PRECISION)
            b_o1 = b_o0
            if V1 > 0:
                b_o1 = product(b_a0, b_s01, tl.zeros((BLOCK_N, V1), dtype=ACC), PRECISION)
            if K1 > 0:
                b_a1 = b_r1.to(dtype)
                b_o0 = product(b_a1, b_s10, b_o0, PRECISION)
                if V1 > 0:
                    b_o1 = product(b_a1, b_s11, b_o1, PRECISION)
            if NORMALIZE:
                if HALF:
                    b_den = tl.dot(b_f0.to(dtype), b_c0, out_dtype=ACC)
                    b_den = tl.sum(b_den, 1) * c_scale0
                    if K1 > 0:
                        b_den += tl.sum(tl.dot(b_f1.to(dtype), b_c1, out_dtype=ACC), 1) * c_scale1
                else:
                    b_den = tl.sum(b_f0 * b_z0[None, :], 1)
                    if K1 > 0:
                        b_den += tl.sum(b_f1 * b_z1[None, :], 1)
                if BY_ROW:
                    b_den *= b_row
                b_inv = 1.0 / (b_den + eps)
                if inverse is not None:  # noqa: SIM102 - known when compiled, the next one is not
                    if first_v == 0:
                        tl.store(inverse + (i_b * H + i_h) * N + o_n, b_inv, mask=m_n)
                b_inv *= s_scale
                b_o0, b_o1 = b_o0 * b_inv[:, None], b_o1 * b_inv[:, None]
            elif dtype == tl.float16:
                b_o0, b_o1 = b_o0 * s_scale, b_o1 * s_scale
            if BY_ROW:
                b_o0, b_o1 = b_o0 * b_row[:, None], b_o1 * b_row[:, None]
            if weight is not None:
                b_w = tl.load(weight + o_n.to(tl.int64) * stride_wn, mask=m_n, other=0.0).to(ACC)
                b_o0, b_o1 = b_o0 * b_w[:, None], b_o1 * b_w[:, None]
            if mask is not None:
                m_k = key_rows(mask, o_n, m_n, stride_mn)
                b_o0 = tl.where(m_k[:, None], b_o0, 0.0)
                b_o1 = tl.where(m_k[:, None], b_o1, 0.0)
            store_pair(p_o, b_o0, b_o1, o_o0, o_o1, m_n, first_v, V, V0, V1, V0)


@lru_cache(maxsize=1024)
def plan_output(
    q: Axes,
    o: Axes,
    side: SidePlan,
    group: int,
    dtype: torch.dtype,
    feature_map: str,
    normalize: bool,
    mean: bool,
    factor: float,
    eps: float,
) -> Launch:
    B, H, N = q.shape[:3]
    K = feature_dim(q.shape[3], feature_map)
    V = o.shape[-1]
    tiling = Tiling.of("output", dtype, K, V, side.rotary, feature_map)
    run, runs = tiling.run(B * H, N)
    programs = side.programs(B * H, H, N, run, runs)
    layout = Layout.of(dtype.itemsize, q, o)
    return Launch(
        output_kernel,
        (programs, tiling.groups),
        (*layout.strides, *side.numbers, factor, eps, H, group, N, run, side.sequences or runs),
        {
            "K": K,
            "V": V,
            "BLOCK_N": tiling.block_tokens,
            **tiling.cover,
            "ORDER_Q": layout.orders[0],
            "ORDER_O": layout.orders[1],
            "UNIT": layout.unit,
            "SAME": layout.same and tiling.uniform,
            "GRAIN": layout.grain,
            "FEATURE_MAP": feature_map,
            "POWER": side.power,
            "ROTARY": side.rotary,
            "NORMALIZE": normalize,
            "MEAN": mean,
            "HALVES": tiling.halves and normalize,
            "ACC": Tiling.acc(dtype),
            "PRECISION": tiling.precision,
        },
        tiling.options,
    )


def launch_output(
    q: torch.Tensor,
    state: torch.Tensor,
    o: torch.Tensor,
    feature_map: str,
    normalize: bool,
    factor: float,
    eps: float,
    *,
    side: Side = PLAIN,
    group: int = 1,
    inverse: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    mean: bool = True,
) -> None:
    """Fill `o`, and `inverse` `(B, H, N)` where given.

    S and z are scaled by `factor`, or with `mean` by 1 / `count` `(B,)` where that is given, before
    `eps` is added. Where the count is 0, o is. `group` query heads share a state. Rows of o are
    multiplied by the weight of `side`, and 0 where its mask is.
    """
    launch = plan_output(
        Axes(q.shape, q.stride()),
        Axes(o.shape, o.stride()),
        side.plan,
        group,
        q.dtype,
        feature_map,
        normalize,
        mean,
        factor,
        eps,
    )
    launch(q, state, o, inverse, count, *side.tensors)

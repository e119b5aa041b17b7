"""Backward for wide heads: the gradient of a query or of a key through its features alone.

For x = q with y = do, and for x = k with y = v and the state's gradient in the state's place:

    dq_i = (g_i / d_i + dd_i z') * phi'(q_i)     g_i = do_i S'^T,  dd_i = -(phi(q_i) . g_i) / d_i^2
    dk_j = w_j (g_j + dz) * phi'(k_j)            g_j = v_j dS^T,  dw_j = phi(k_j) . (g_j + dz)

With `inverse` (1 / d_i, from the forward pass) it is the first, and dz' = sum_i dd_i phi(q_i) is
summed on the way; without it, the second. `grad_query` and `grad_key` do this and the rest in one
pass where the registers suffice.
"""

from functools import lru_cache

import torch
import triton.language as tl

from ..feature_maps import feature_dim
from .features import feature_gradients, features, load_channels, load_columns, store_channels
from .launch import Launch, kernel
from .masks import key_rows, tile_mask, token_mask, whole_blocks
from .memory import Axes, Layout
from .programs import locate
from .rotary import load_table, rotate
from .shift import shifted_pair
from .side import Side, SidePlan
from .tiles import (
    column_operand,
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
    tile_offset,
    token_offset,
)
from .tiling import Tiling


@kernel
def grad_feature_kernel(
    x, y, state, inverse, count, shift, weight, mask, table, rows, columns, cu,
    dx, dweight, partial,
    stride_xb: "i64", stride_xh: "i64", stride_xn: "i64", stride_xd: "i64",
    stride_yb: "i64", stride_yh: "i64", stride_yn: "i64", stride_yd: "i64",
    stride_gb: "i64", stride_gh: "i64", stride_gn: "i64", stride_gd: "i64",
    stride_wb: "i64", stride_wh: "i64", stride_wn: "i64", stride_mb: "i64", stride_mn: "i64",
    stride_th: "i64", factor: "fp64",
    H: "i32", group: "i32", N: "i32", chunk: "i32", splits: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    GROUPS: tl.constexpr,
    ORDER_X: tl.constexpr, ORDER_Y: tl.constexpr, ORDER_G: tl.constexpr, UNIT: tl.constexpr,
    SAME: tl.constexpr, GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, POWER: tl.constexpr, ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_x, start, end, row = locate(cu, H, N, chunk, splits, GRAIN)
    i_bh = i_b * H + i_h
    factor = mean_factor(factor, count, i_x, ACC)
    if weight is not None:
        weight += i_b * stride_wb + i_h * stride_wh
    if dweight is not None:
        dweight += i_bh * N
    if mask is not None:
        mask += i_b * stride_mb
    if table is not None:
        table += i_h * stride_th * K
    c_0, c_1 = load_columns(rows, columns, i_h, K, K0, K1, KB)
    if rows is not None:
        rows += i_b * 3 * N

    x += head_offset(i_b, i_h, stride_xb, stride_xh, ORDER_X, UNIT)
    y += head_offset(i_b, i_h, stride_yb, stride_yh, ORDER_Y, UNIT)
    dx += head_offset(i_b, i_h, stride_gb, stride_gh, ORDER_G, UNIT)
    o_x0, o_x1 = pair_offset(stride_xn, stride_xd, 0, BLOCK_N, K0, K1, KB, ORDER_X, UNIT)
    if SAME:
        o_y0, o_y1, o_g0, o_g1 = o_x0, o_x1, o_x0, o_x1
    else:
        o_y0, o_y1 = pair_offset(stride_yn, stride_yd, 0, BLOCK_N, V0, V1, V0, ORDER_Y, UNIT)
        o_g0, o_g1 = pair_offset(stride_gn, stride_gd, 0, BLOCK_N, K0, K1, KB, ORDER_G, UNIT)
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = (dtype == tl.float16) or (dtype == tl.bfloat16)
    # As in `output_kernel`.
    BY_ROW: tl.constexpr = rows is not None and dtype == tl.float16

    state += (i_x * (H // group) + i_h // group) * (K * V + K)
    if GROUPS == 1:
        b_s00, b_s01, b_s10, b_s11, s_scale = load_state(
            state, factor, 0, K, V, K0, K1, KB, V0, V1, dtype
        )
    if NORMALIZE:
        b_z0, b_z1 = load_key_sum(state, factor, K, V, K0, K1, KB)
    # 16-bit types sum dz' on the tensor cores; others keep a row for every token of a block.
    b_dz0 = tl.zeros((16 if HALF else BLOCK_N, K0), dtype=ACC)
    b_dz1 = b_dz0
    if K1 > 0:
        b_dz1 = tl.zeros((16 if HALF else BLOCK_N, K1), dtype=ACC)

    whole = whole_blocks(start, end, BLOCK_N)
    for WHOLE in tl.static_range(1, -1, -1):
        first = start if WHOLE else whole
        last = whole if WHOLE else end
        for i_n in tl.range(first, last, BLOCK_N, num_stages=None if WHOLE else 1):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = token_mask(o_n, end, WHOLE)
            m_x = key_rows(mask, o_n, m_n, stride_mn)
            p_x = x + token_offset(i_n, stride_xn, ORDER_X, UNIT)
            p_y = y + token_offset(i_n, stride_yn, ORDER_Y, UNIT)
            p_g = dx + token_offset(i_n, stride_gn, ORDER_G, UNIT)
            b_x0, b_x1 = load_channels(p_x, o_x0, o_x1, m_x, K, K0, K1, KB, FEATURE_MAP)
            b_x0, b_x1 = shifted_pair(b_x0, b_x1, shift, i_h, o_n, m_x, H, K, K0, K1, KB)

            b_g0 = tl.zeros((BLOCK_N, K0), dtype=ACC)
            b_g1 = b_g0
            if K1 > 0:
                b_g1 = tl.zeros((BLOCK_N, K1), dtype=ACC)
            if GROUPS == 1:
                b_y0, b_y1 = load_pair(p_y, o_y0, o_y1, m_x, 0, V, V0, V1, V0)
                b_g0 = product(b_y0, tl.trans(b_s00), b_g0, PRECISION)
                if V1 > 0:
                    b_g0 = product(b_y1, tl.trans(b_s01), b_g0, PRECISION)
                if K1 > 0:
                    b_g1 = product(b_y0, tl.trans(b_s10), b_g1, PRECISION)
                if K1 * V1 > 0:
                    b_g1 = product(b_y1, tl.trans(b_s11), b_g1, PRECISION)
                if dtype == tl.float16:
                    b_g0, b_g1 = b_g0 * s_scale, b_g1 * s_scale
            else:
                for j in range(GROUPS):
                    c_o = tile_offset(stride_yn, stride_yd, j * V0, BLOCK_N, V0, ORDER_Y, UNIT)
                    c_y = tl.load(p_y + c_o, mask=tile_mask(m_x, j * V0, V, V0, V0), other=0.0)
                    c_s0, _, c_s1, _, c_scale = load_state(
                        state, factor, j * V0, K, V, K0, K1, KB, V0, 0, dtype
                    )
                    b_g0 = scaled_product(c_y, tl.trans(c_s0), b_g0, c_scale, PRECISION)
                    if K1 > 0:
                        b_g1 = scaled_product(c_y, tl.trans(c_s1), b_g1, c_scale, PRECISION)
            # Never true; as in `grad_query_kernel`.
            b_x0 = tl.where(b_g0 > float("inf"), 0.0, b_x0)
            if K1 > 0:
                b_x1 = tl.where(b_g1 > float("inf"), 0.0, b_x1)
            b_f0, b_f1 = features(
                b_x0, b_x1, rows, c_0, c_1, o_n, m_x, N, K1, FEATURE_MAP, POWER, ACC
            )
            if table is not None:
                b_t0, b_t1 = load_table(table, i_n, m_n, K, K0, K1, KB, BLOCK_N)
                b_t0 = tl.where(b_g0 > float("inf"), 0.0, b_t0)
                if K1 > 0:
                    b_t1 = tl.where(b_g1 > float("inf"), 0.0, b_t1)
                b_g0, b_g1 = rotate(b_g0, b_g1, b_t0, b_t1, K1, ROTARY, True)

            if inverse is not None:
                b_fg = tl.sum(b_f0 * b_g0, 1)
                if K1 > 0:
                    b_fg += tl.sum(b_f1 * b_g1, 1)
                b_inv = tl.load(inverse + i_bh * N + o_n, mask=m_n, other=0.0)
                b_dden = -(b_fg * b_inv) * b_inv
                if HALF:
                    b_a0, b_a1 = b_f0, b_f1
                    if BY_ROW:
                        b_row = operand_scale(row_peak(b_f0, b_f1, K1))
                        b_a0, b_a1 = b_f0 * (1.0 / b_row)[:, None], b_f1 * (1.0 / b_row)[:, None]
                        b_c, c_scale = column_operand(b_dden * b_row, dtype)
                    else:
                        b_c, c_scale = column_operand(b_dden, dtype)
                    b_c = tl.trans(b_c)
                    b_dz0 = scaled_product(b_c, b_a0.to(dtype), b_dz0, c_scale, PRECISION)
                    if K1 > 0:
                        b_dz1 = scaled_product(b_c, b_a1.to(dtype), b_dz1, c_scale, PRECISION)
                else:
                    b_dz0 += b_f0 * b_dden[:, None]
                    if K1 > 0:
                        b_dz1 += b_f1 * b_dden[:, None]
                b_g0 = b_g0 * b_inv[:, None] + b_dden[:, None] * b_z0[None, :]
                if K1 > 0:
                    b_g1 = b_g1 * b_inv[:, None] + b_dden[:, None] * b_z1[None, :]
            elif NORMALIZE:
                b_g0 += b_z0[None, :]
                if K1 > 0:
                    b_g1 += b_z1[None, :]
            if dweight is not None:
                b_dw = tl.sum(b_f0 * b_g0, 1)
                if K1 > 0:
                    b_dw += tl.sum(b_f1 * b_g1, 1)
                tl.store(dweight + o_n, tl.where(m_x, b_dw, 0.0), mask=m_n)
            if weight is not None:
                b_w = tl.load(weight + o_n.to(tl.int64) * stride_wn, mask=m_x, other=0.0).to(ACC)
                b_g0, b_g1 = b_g0 * b_w[:, None], b_g1 * b_w[:, None]
            b_dx0, b_dx1 = feature_gradients(b_g0, b_g1, b_f0, b_f1, K1, FEATURE_MAP)
            if mask is not None:
                b_dx0 = tl.where(m_x[:, None], b_dx0, 0.0)
                b_dx1 = tl.where(m_x[:, None], b_dx1, 0.0)
            store_channels(p_g, b_dx0, b_dx1, o_g0, o_g1, m_n, K, K0, K1, KB, FEATURE_MAP)

    if partial is not None:
        store_key_sum(partial + row * K, tl.sum(b_dz0, 0), tl.sum(b_dz1, 0), K, 0, K0, K1, KB)


@lru_cache(maxsize=1024)
def plan_grad_feature(
    x: Axes,
    y: Axes,
    dx: Axes,
    side: SidePlan,
    group: int,
    dtype: torch.dtype,
    feature_map: str,
    normalize: bool,
    factor: float,
    sums: bool,
) -> tuple[Launch, int, tuple[int, ...], torch.dtype]:
    """(launch, chunk, shape and dtype of the partial sums of z')."""
    B, H, N = x.shape[:3]
    K = feature_dim(x.shape[3], feature_map)
    V = y.shape[-1]
    name = "grad_feature" if sums else "grad_feature_of_key"
    tiling = Tiling.of(name, dtype, K, V, side.rotary, feature_map)
    chunk, splits = tiling.split(N) if sums else tiling.run(B * H, N)
    programs = side.programs(B * H, H, N, chunk, splits)
    layout = Layout.of(dtype.itemsize, x, y, dx)
    launch = Launch(
        grad_feature_kernel,
        (programs, 1),
        (*layout.strides, *side.numbers, factor, H, group, N, chunk, side.sequences or splits),
        {
            "K": K,
            "V": V,
            "BLOCK_N": tiling.block_tokens,
            **tiling.cover,
            "GROUPS": tiling.groups,
            "ORDER_X": layout.orders[0],
            "ORDER_Y": layout.orders[1],
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
    return launch, chunk, (*rows, K), tiling.acc_dtype


def launch_grad_feature(
    x: torch.Tensor,
    y: torch.Tensor,
    state: torch.Tensor,
    dx: torch.Tensor,
    side: Side,
    group: int,
    feature_map: str,
    normalize: bool,
    factor: float,
    *,
    inverse: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
) -> tuple[int, torch.Tensor | None]:
    """Fill `dx`; return (chunk, partial sums of z' as `sum_partial` takes them, with `inverse`).

    The rest is as for `launch_grad_query` and `launch_grad_key`.
    """
    launch, chunk, shape, dtype = plan_grad_feature(
        Axes(x.shape, x.stride()),
        Axes(y.shape, y.stride()),
        Axes(dx.shape, dx.stride()),
        side.plan,
        group,
        x.dtype,
        feature_map,
        normalize,
        factor,
        inverse is not None,
    )
    partial = None if inverse is None else x.new_empty(shape, dtype=dtype)
    launch(x, y, state, inverse, count, *side.tensors, dx, dweight, partial)
    return chunk, partial

"""The forward pass of short sequences: a program a head, which first goes over the keys and then
over the queries. S stays on the chip, and there is one launch instead of two.

The formulas are those of `state.py` and `output.py`, for calls without options, and with `mean`
that of `centre.py`.
"""

from functools import lru_cache

import torch
import triton.language as tl

from .features import feature
from .launch import Launch, kernel
from .masks import tile_mask
from .memory import Axes, Layout
from .tiles import (
    column_operand,
    few_rows,
    head_offset,
    product,
    state_halves,
    state_operands,
    store_key_sum,
    store_state_tile,
    tile_offset,
    token_offset,
)
from .tiling import Tiling

# With more tokens than this, several programs a head are faster.
LONGEST = 256
# The widest head that one tile covers.
WIDEST = 64


@kernel
def short_kernel(
    q, k, v, o, state, inverse, mean, centre,
    stride_qb: "i64", stride_qh: "i64", stride_qn: "i64", stride_qd: "i64",
    stride_kb: "i64", stride_kh: "i64", stride_km: "i64", stride_kd: "i64",
    stride_vb: "i64", stride_vh: "i64", stride_vm: "i64", stride_vd: "i64",
    stride_ob: "i64", stride_oh: "i64", stride_on: "i64", stride_od: "i64",
    factor: "fp64", eps: "fp64",
    H: "i32", N: "i32", M: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K0: tl.constexpr, V0: tl.constexpr,
    ORDER_Q: tl.constexpr, ORDER_K: tl.constexpr, ORDER_V: tl.constexpr, ORDER_O: tl.constexpr,
    UNIT: tl.constexpr, SAME: tl.constexpr, GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr, HALVES: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    q += head_offset(i_b, i_h, stride_qb, stride_qh, ORDER_Q, UNIT)
    k += head_offset(i_b, i_h, stride_kb, stride_kh, ORDER_K, UNIT)
    v += head_offset(i_b, i_h, stride_vb, stride_vh, ORDER_V, UNIT)
    o += head_offset(i_b, i_h, stride_ob, stride_oh, ORDER_O, UNIT)
    o_k = tile_offset(stride_km, stride_kd, 0, BLOCK_N, K0, ORDER_K, UNIT)
    o_v, o_q, o_o = o_k, o_k, o_k
    if not SAME:
        o_v = tile_offset(stride_vm, stride_vd, 0, BLOCK_N, V0, ORDER_V, UNIT)
        o_q = tile_offset(stride_qn, stride_qd, 0, BLOCK_N, K0, ORDER_Q, UNIT)
        o_o = tile_offset(stride_on, stride_od, 0, BLOCK_N, V0, ORDER_O, UNIT)
    dtype: tl.constexpr = q.dtype.element_ty
    # As in `programs.locate`.
    N, M = N // GRAIN * GRAIN, M // GRAIN * GRAIN

    b_s = tl.zeros((K0, V0), dtype=ACC)
    # Kept two-dimensional until the end: one reduction over tokens instead of one a block.
    b_z = tl.zeros((BLOCK_N if mean is None else 16, K0), dtype=ACC)
    if mean is not None:
        b_y = tl.zeros((16, V0), dtype=ACC)
    for i_m in range(0, M, BLOCK_N):
        m_m = i_m + tl.arange(0, BLOCK_N) < M
        p_k = k + token_offset(i_m, stride_km, ORDER_K, UNIT)
        p_v = v + token_offset(i_m, stride_vm, ORDER_V, UNIT)
        b_k = tl.load(p_k + o_k, mask=tile_mask(m_m, 0, K, K0, K0), other=0.0)
        b_v = tl.load(p_v + o_v, mask=tile_mask(m_m, 0, V, V0, V0), other=0.0)
        # phi(0) is not 0 for every map.
        b_f = tl.where(m_m[:, None], feature(b_k.to(ACC), FEATURE_MAP), 0.0)
        if mean is not None:
            b_y += few_rows(b_v.to(ACC))
            b_z += few_rows(b_f.to(dtype).to(ACC))
        else:
            b_z += b_f
        b_s = product(tl.trans(b_f.to(dtype)), b_v, b_s, PRECISION)

    c_z = tl.sum(b_z, 0)
    if mean is not None:
        c_y = tl.sum(b_y, 0) / tl.cast(M, ACC)
        o_y = i_bh * V + tl.arange(0, V0)
        m_y = tl.arange(0, V0) < V
        tl.store(mean + o_y, c_y.to(dtype), mask=m_y)
        if centre is not None:
            tl.store(centre + o_y, c_y, mask=m_y)
        b_s -= c_z[:, None] * c_y[None, :]
    if K < K0:
        # Channels that there are not: phi(0), or NaN where a value is inf.
        inside = tl.arange(0, K0) < K
        c_z = tl.where(inside, c_z, 0.0)
        b_s = tl.where(inside[:, None], b_s, 0.0)
    if state is not None:
        state += i_bh * (K * V + K)
        store_state_tile(state, b_s, 0, 0, K, V, K0, V0, K0)
        store_key_sum(state, c_z, c_z, K, V, K0, 0, K0)
    factor = tl.full((), factor, ACC)
    b_s *= factor
    b_rest = b_s
    if HALVES:
        b_s, b_rest, s_scale = state_halves(b_s, dtype)
    else:
        b_s, _, _, _, s_scale = state_operands(b_s, b_s, b_s, b_s, 0, 0, dtype)
    if NORMALIZE:
        b_c, c_scale = column_operand(c_z * factor, dtype)

    for i_n in range(0, N, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        p_q = q + token_offset(i_n, stride_qn, ORDER_Q, UNIT)
        b_q = tl.load(p_q + o_q, mask=tile_mask(m_n, 0, K, K0, K0), other=0.0)
        b_f = feature(b_q.to(ACC), FEATURE_MAP).to(dtype)
        b_o = tl.zeros((BLOCK_N, V0), dtype=ACC)
        if HALVES:
            b_o = product(b_f, b_rest, b_o, PRECISION)
        b_o = product(b_f, b_s, b_o, PRECISION)
        if NORMALIZE:
            b_den = tl.sum(tl.dot(b_f, b_c, out_dtype=ACC), 1) * c_scale
            b_inv = 1.0 / (b_den + tl.full((), eps, ACC))
            if inverse is not None:
                tl.store(inverse + i_bh * N + o_n, b_inv, mask=m_n)
            b_o *= (b_inv * s_scale)[:, None]
        elif dtype == tl.float16:
            b_o *= s_scale
        p_o = o + token_offset(i_n, stride_on, ORDER_O, UNIT)
        tl.store(p_o + o_o, b_o.to(dtype), mask=tile_mask(m_n, 0, V, V0, V0))


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str) -> bool:
    """Whether `short_kernel` is for them: 16-bit, one tile a head, each with its own keys.

    B and H do not enter: what a head gives must not depend on how many there are.
    """
    return (
        q.dtype.itemsize == 2
        and feature_map != "signed"
        and q.shape[1] == k.shape[1]
        and max(q.shape[2], k.shape[2]) <= LONGEST
        and max(q.shape[3], v.shape[3]) <= WIDEST
    )


@lru_cache(maxsize=1024)
def plan_short(
    q: Axes,
    k: Axes,
    v: Axes,
    o: Axes,
    dtype: torch.dtype,
    feature_map: str,
    normalize: bool,
    factor: float,
    eps: float,
) -> Launch:
    B, H, N, K = q.shape
    M, V = v.shape[2:]
    tiling = Tiling.of("short", dtype, K, V, feature_map=feature_map)
    layout = Layout.of(dtype.itemsize, q, k, v, o)
    return Launch(
        short_kernel,
        (B * H, 1),
        (*layout.strides, factor, eps, H, N, M),
        {
            "K": K,
            "V": V,
            "BLOCK_N": tiling.block_tokens,
            "K0": tiling.k0,
            "V0": tiling.v0,
            "ORDER_Q": layout.orders[0],
            "ORDER_K": layout.orders[1],
            "ORDER_V": layout.orders[2],
            "ORDER_O": layout.orders[3],
            "UNIT": layout.unit,
            "SAME": layout.same and tiling.uniform,
            "GRAIN": layout.grain,
            "FEATURE_MAP": feature_map,
            "NORMALIZE": normalize,
            "HALVES": tiling.halves and normalize,
            "ACC": Tiling.acc(dtype),
            "PRECISION": tiling.precision,
        },
        tiling.options,
    )


def launch_short(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    state: torch.Tensor | None,
    inverse: torch.Tensor | None,
    feature_map: str,
    normalize: bool,
    factor: float,
    eps: float,
    mean: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
) -> None:
    """Fill `o` and, where given, the state `(B * H, K * V + K)` and 1 / denominator `(B, H, N)`.

    With `mean` `(B, H, V)` the values are taken about theirs, which is written there, and to
    `centre` in the type of sums.
    """
    axes = (Axes(x.shape, x.stride()) for x in (q, k, v, o))
    launch = plan_short(*axes, q.dtype, feature_map, normalize, factor, eps)
    launch(q, k, v, o, state, inverse, mean, centre)

"""The state of a set of keys, `S = sum_j w_j phi(k_j)^T v_j` and `z = sum_j w_j phi(k_j)`.

k `(B, H, M, K)`, v `(B, H, M, V)` -> state `(B * H, K * V + K)`, S row-major and then z. For
`centre.py` the sum of the values comes after them, and z is that of the features as S has them,
which the products round.

The tokens are split over programs; each writes its partial sums, and a second kernel adds them in
a fixed order. There are no atomics, and the split depends on (M, K, V) alone, never on B or H: the
result is the same bit for bit from run to run and whatever else is in the batch.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..feature_maps import feature_dim
from .features import features, load_channels, load_columns
from .launch import Launch, kernel
from .masks import column_mask, key_rows, token_mask, whole_blocks
from .memory import Axes, Layout
from .programs import locate
from .rotary import load_table, rotate
from .shift import shifted_pair
from .side import Side, SidePlan
from .sums import sum_partial
from .tiles import (
    few_rows,
    head_offset,
    load_pair,
    operand_scale,
    pair_offset,
    peak,
    product,
    scaled_product,
    store_key_sum,
    store_state,
    token_offset,
)
from .tiling import Tiling


@kernel
def state_kernel(
    k, v, shift, weight, mask, table, rows, columns, cu, partial,
    stride_kb: "i64", stride_kh: "i64", stride_km: "i64", stride_kd: "i64",
    stride_vb: "i64", stride_vh: "i64", stride_vm: "i64", stride_vd: "i64",
    stride_wb: "i64", stride_wh: "i64", stride_wm: "i64", stride_mb: "i64", stride_mm: "i64",
    stride_th: "i64",
    H: "i32", M: "i32", chunk: "i32", splits: "i32",
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ORDER_K: tl.constexpr, ORDER_V: tl.constexpr, UNIT: tl.constexpr, SAME: tl.constexpr,
    GRAIN: tl.constexpr,
    FEATURE_MAP: tl.constexpr, POWER: tl.constexpr, ROTARY: tl.constexpr, SUM_KEYS: tl.constexpr,
    SUM_VALUES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, _, start, end, row = locate(cu, H, M, chunk, splits, GRAIN)
    k += head_offset(i_b, i_h, stride_kb, stride_kh, ORDER_K, UNIT)
    v += head_offset(i_b, i_h, stride_vb, stride_vh, ORDER_V, UNIT)
    if weight is not None:
        weight += i_b * stride_wb + i_h * stride_wh
    if mask is not None:
        mask += i_b * stride_mb
    if table is not None:
        table += i_h * stride_th * K
    c_0, c_1 = load_columns(rows, columns, i_h, K, K0, K1, KB)
    if rows is not None:
        rows += i_b * 3 * M
    # Of S a program takes as many rows as there are, or all: then some of the columns.
    PART: tl.constexpr = K // PARTS
    first_k = tl.program_id(1) * PART if PARTS > 1 else 0
    first_v = 0 if PARTS > 1 else tl.program_id(1) * (V0 + V1)
    o_k0, o_k1 = pair_offset(stride_km, stride_kd, first_k, BLOCK_M, K0, K1, KB, ORDER_K, UNIT)
    if SAME:
        o_v0, o_v1 = o_k0, o_k1
    else:
        o_v0, o_v1 = pair_offset(stride_vm, stride_vd, first_v, BLOCK_M, V0, V1, V0, ORDER_V, UNIT)
    dtype: tl.constexpr = k.dtype.element_ty
    # float16 ends at 65504 and at 6e-8, and what a weight makes of phi(k), or the focused map of a
    # head whose channels are smaller than another's, may be beyond.
    RESCALE: tl.constexpr = (weight is not None or rows is not None) and dtype == tl.float16

    b_s00 = tl.zeros((K0, V0), dtype=ACC)
    # Kept two-dimensional until the end: one reduction over tokens instead of one a block.
    ROWS: tl.constexpr = 16 if SUM_VALUES else BLOCK_M
    b_z0 = tl.zeros((ROWS, K0), dtype=ACC)
    b_s01, b_s10, b_s11, b_z1 = b_s00, b_s00, b_s00, b_z0
    if V1 > 0:
        b_s01 = tl.zeros((K0, V1), dtype=ACC)
    if K1 > 0:
        b_s10 = tl.zeros((K1, V0), dtype=ACC)
        b_z1 = tl.zeros((ROWS, K1), dtype=ACC)
    if K1 * V1 > 0:
        b_s11 = tl.zeros((K1, V1), dtype=ACC)
    if SUM_VALUES:
        b_y0 = tl.zeros((ROWS, V0), dtype=ACC)
        b_y1 = b_y0
        if V1 > 0:
            b_y1 = tl.zeros((ROWS, V1), dtype=ACC)

    # Narrow heads are faster with masks.
    PARTED: tl.constexpr = K0 > 32
    whole = whole_blocks(start, end, BLOCK_M) if PARTED else start
    for WHOLE in tl.static_range(1 if PARTED else 0, -1, -1):
        first = start if WHOLE else whole
        last = whole if WHOLE else end
        for i_m in tl.range(first, last, BLOCK_M, num_stages=1 if PARTED and not WHOLE else None):
            o_m = i_m + tl.arange(0, BLOCK_M)
            m_m = key_rows(mask, o_m, token_mask(o_m, end, WHOLE), stride_mm)
            p_k = k + token_offset(i_m, stride_km, ORDER_K, UNIT)
            p_v = v + token_offset(i_m, stride_vm, ORDER_V, UNIT)
            b_k0, b_k1 = load_channels(p_k, o_k0, o_k1, m_m, PART, K0, K1, KB, FEATURE_MAP)
            b_k0, b_k1 = shifted_pair(b_k0, b_k1, shift, i_h, o_m, m_m, H, K, K0, K1, KB)
            b_v0, b_v1 = load_pair(p_v, o_v0, o_v1, m_m, first_v, V, V0, V1, V0)
            b_f0, b_f1 = features(
                b_k0, b_k1, rows, c_0, c_1, o_m, m_m, M, K1, FEATURE_MAP, POWER, ACC
            )
            if SUM_KEYS:
                # phi(0) is not 0 for every map, so rows beyond the end are cleared. Whole blocks
                # have the select too: without, Triton computes phi twice, in each sum's layout.
                m_f = m_m & (o_m < end)
                b_f0 = tl.where(m_f[:, None], b_f0, 0.0)
                if K1 > 0:
                    b_f1 = tl.where(m_f[:, None], b_f1, 0.0)
            if weight is not None:
                b_w = tl.load(weight + o_m.to(tl.int64) * stride_wm, mask=m_m, other=0.0).to(ACC)
                b_f0, b_f1 = b_f0 * b_w[:, None], b_f1 * b_w[:, None]
            if SUM_VALUES:
                b_y0 += few_rows(b_v0.to(ACC))
                if V1 > 0:
                    b_y1 += few_rows(b_v1.to(ACC))
                b_z0 += few_rows(b_f0.to(dtype).to(ACC))
                if K1 > 0:
                    b_z1 += few_rows(b_f1.to(dtype).to(ACC))
            elif SUM_KEYS:
                b_z0 += b_f0
                if K1 > 0:
                    b_z1 += b_f1
            if table is not None:
                b_t0, b_t1 = load_table(table, i_m, m_m, K, K0, K1, KB, BLOCK_M)
                b_f0, b_f1 = rotate(b_f0, b_f1, b_t0, b_t1, K1, ROTARY, False)
            scale = 1.0
            if RESCALE:
                top = peak(b_f0)
                if K1 > 0:
                    top = tl.maximum(top, peak(b_f1))
                scale = operand_scale(top)
                shrink = 1.0 / scale
                b_f0, b_f1 = b_f0 * shrink, b_f1 * shrink
            b_a0 = tl.trans(b_f0.to(dtype))
            b_s00 = accumulate(b_a0, b_v0, b_s00, scale, RESCALE, PRECISION)
            if V1 > 0:
                b_s01 = accumulate(b_a0, b_v1, b_s01, scale, RESCALE, PRECISION)
            if K1 > 0:
                b_a1 = tl.trans(b_f1.to(dtype))
                b_s10 = accumulate(b_a1, b_v0, b_s10, scale, RESCALE, PRECISION)
                if V1 > 0:
                    b_s11 = accumulate(b_a1, b_v1, b_s11, scale, RESCALE, PRECISION)

    partial += row * (K * V + (K if SUM_KEYS else 0) + (V if SUM_VALUES else 0))
    p_s = partial + first_k * V
    store_state(p_s, b_s00, b_s01, b_s10, b_s11, first_v, PART, V, K0, K1, KB, V0, V1)
    if SUM_KEYS and first_v == 0:
        p_z = partial + K * V + first_k
        store_key_sum(p_z, tl.sum(b_z0, 0), tl.sum(b_z1, 0), PART, 0, K0, K1, KB)
    if SUM_VALUES and first_k == 0:
        p_y = partial + K * V + K + first_v
        tl.store(p_y + tl.arange(0, V0), tl.sum(b_y0, 0), mask=column_mask(first_v, V, V0, V0))
        if V1 > 0:
            p_y += V0
            m_y = column_mask(first_v + V0, V, V1, V1)
            tl.store(p_y + tl.arange(0, V1), tl.sum(b_y1, 0), mask=m_y)


@triton.jit
def accumulate(a, b, acc, scale, RESCALE: tl.constexpr, PRECISION: tl.constexpr):
    if RESCALE:
        return scaled_product(a, b, acc, scale, PRECISION)
    else:
        return product(a, b, acc, PRECISION)


@lru_cache(maxsize=1024)
def plan_state(
    k: Axes,
    v: Axes,
    side: SidePlan,
    dtype: torch.dtype,
    feature_map: str,
    sum_keys: bool,
    sum_values: bool = False,
) -> tuple[Launch, int, tuple[int, ...], torch.dtype]:
    """(launch, chunk, shape and dtype of the partial sums)."""
    B, H, M = k.shape[:3]
    K = feature_dim(k.shape[3], feature_map)
    V = v.shape[-1]
    tiling = Tiling.of("state" if sum_keys else "grad_state", dtype, K, V, side.rotary, feature_map)
    chunk, splits = tiling.split(M)
    programs = side.programs(B * H, H, M, chunk, splits)
    layout = Layout.of(dtype.itemsize, k, v)
    launch = Launch(
        state_kernel,
        (programs, tiling.groups * tiling.parts),
        (*layout.strides, *side.numbers, H, M, chunk, side.sequences or splits),
        {
            "K": K,
            "V": V,
            "BLOCK_M": tiling.block_tokens,
            "PARTS": tiling.parts,
            **tiling.cover,
            "ORDER_K": layout.orders[0],
            "ORDER_V": layout.orders[1],
            "UNIT": layout.unit,
            "SAME": layout.same and tiling.uniform,
            "GRAIN": layout.grain,
            "FEATURE_MAP": feature_map,
            "POWER": side.power,
            "ROTARY": side.rotary,
            "SUM_KEYS": sum_keys,
            "SUM_VALUES": sum_values,
            "ACC": Tiling.acc(dtype),
            "PRECISION": tiling.precision,
        },
        tiling.options,
    )
    rows = (programs // H, H) if side.sequences else (B, H, splits)
    size = K * V + (K if sum_keys else 0) + (V if sum_values else 0)
    return launch, chunk, (*rows, size), tiling.acc_dtype


def launch_partial_state(
    k: torch.Tensor,
    v: torch.Tensor,
    side: Side,
    feature_map: str,
    *,
    sum_keys: bool,
    sum_values: bool = False,
) -> tuple[int, torch.Tensor]:
    """(chunk, partial sums), one for every `chunk` of tokens, as `sums.sum_partial` takes them.

    Without `sum_keys` there is no z in them; with `sum_values` there is `sum_j v_j` after it.
    """
    launch, chunk, shape, dtype = plan_state(
        Axes(k.shape, k.stride()),
        Axes(v.shape, v.stride()),
        side.plan,
        k.dtype,
        feature_map,
        sum_keys,
        sum_values,
    )
    partial = k.new_empty(shape, dtype=dtype)
    launch(k, v, *side.tensors, partial)
    return chunk, partial


def launch_state(k: torch.Tensor, v: torch.Tensor, side: Side, feature_map: str) -> torch.Tensor:
    """State `(B * H, K * V + K)` of k and v; packed, of each sequence: `(S * H, K * V + K)`."""
    chunk, partial = launch_partial_state(k, v, side, feature_map, sum_keys=True)
    return sum_partial(partial, k.shape[1], side.cu_seqlens, chunk, k.shape[2])

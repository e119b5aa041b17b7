"""The state of values about their mean, which is subtracted from none of them.

    S' = sum_j phi(k_j)^T (v_j - m) = S - z^T m        m = sum_j v_j / M

S and z are large beside S' where the values have a large mean. They are sums of the same rounded
features, and the correction is in the type of sums, so that what was rounded stays out of it. So it
is in the backward pass,

    dm = -z dS'        dz = -dS' m^T        dphi(k_j) = v_j dS'^T + dz

where dS' is rounded as the operand that it is a factor of v_j as. What the mean gets from elsewhere
is added to dm, and each of the values gets its share, dm / M.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .side import PLAIN
from .state import launch_partial_state
from .sums import BLOCK
from .tiles import operand_scale, peak
from .tiling import Tiling

# Numbers of dS' that a program has at a time.
LARGEST_TILE = 4096


@kernel
def centre_kernel(
    partial, state, mean, centre, splits: "i32", M: "i32",
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = K * V + K + V
    blocks = (SIZE + BLOCK - 1) // BLOCK
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, 8)
    b_x = tl.zeros((BLOCK,), dtype=ACC)
    # What z and the sum of the values have to do with this number of S.
    b_z, b_y = b_x, b_x
    for i_s in range(0, splits, 8):
        row = partial + (i_bh * splits + i_s + o_s)[:, None] * SIZE
        m_s = (i_s + o_s < splits)[:, None]
        m_x = m_s & (o < K * V)[None, :]
        b_x += tl.sum(tl.load(row + o[None, :], mask=m_s & (o < SIZE)[None, :], other=0.0), 0)
        b_z += tl.sum(tl.load(row + (K * V + o // V)[None, :], mask=m_x, other=0.0), 0)
        b_y += tl.sum(tl.load(row + (K * V + K + o % V)[None, :], mask=m_x, other=0.0), 0)
    M = tl.cast(M, ACC)
    tl.store(state + i_bh * (K * V + K) + o, b_x - b_z * (b_y / M), mask=o < K * V + K)
    o_y = i_bh * V + o - (K * V + K)
    m_y = (o >= K * V + K) & (o < SIZE)
    tl.store(mean + o_y, (b_x / M).to(mean.dtype.element_ty), mask=m_y)
    if centre is not None:
        tl.store(centre + o_y, b_x / M, mask=m_y)


@kernel
def centre_gradient_kernel(
    dstate, state, centre, dmean, operand, share, factor: "fp64", M: "i32",
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, V0: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, V0)
    m_v = o_v < V
    dtype: tl.constexpr = dmean.dtype.element_ty
    b_m = tl.load(centre + i_bh * V + o_v, mask=m_v, other=0.0)
    b_dm = tl.load(dmean + i_bh * V + o_v, mask=m_v, other=0.0).to(ACC)
    for i_k in range(0, K, ROWS):
        o_k = i_k + tl.arange(0, ROWS)
        m_k = o_k < K
        o_s = i_bh * (K * V + K) + o_k[:, None] * V + o_v[None, :]
        m_s = m_k[:, None] & m_v[None, :]
        o_z = i_bh * (K * V + K) + K * V + o_k
        b_ds = tl.load(dstate + o_s, mask=m_s, other=0.0) * tl.full((), factor, ACC)
        b_z = tl.load(state + o_z, mask=m_k, other=0.0)
        b_ds = rounded(b_ds, dtype)
        b_dm -= tl.sum(b_z[:, None] * b_ds, 0)
        tl.store(operand + o_s, b_ds, mask=m_s)
        tl.store(operand + o_z, -tl.sum(b_ds * b_m[None, :], 1), mask=m_k)
    tl.store(share + i_bh * V + o_v, b_dm / tl.cast(M, ACC), mask=m_v)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as `state_operands` rounds it, in its own type."""
    if dtype == tl.float16:
        scale = operand_scale(peak(x))
        return (x * (1.0 / scale)).to(dtype).to(x.dtype) * scale
    else:
        return x.to(dtype).to(x.dtype)


@lru_cache(maxsize=1024)
def plan_centre(states: int, splits: int, M: int, K: int, V: int, dtype: torch.dtype) -> Launch:
    return Launch(
        centre_kernel,
        (states * triton.cdiv(K * V + K + V, BLOCK), 1),
        (splits, M),
        {"K": K, "V": V, "BLOCK": BLOCK, "ACC": Tiling.acc(dtype)},
        {"num_warps": 4, "num_stages": 1},
    )


@lru_cache(maxsize=1024)
def plan_centre_gradient(
    states: int, M: int, K: int, V: int, dtype: torch.dtype, factor: float
) -> Launch:
    columns = triton.next_power_of_2(V)
    rows = min(triton.next_power_of_2(K), LARGEST_TILE // columns)
    return Launch(
        centre_gradient_kernel,
        (states, 1),
        (factor, M),
        {"K": K, "V": V, "ROWS": rows, "V0": columns, "ACC": Tiling.acc(dtype)},
        {"num_warps": 4, "num_stages": 1},
    )


def launch_centred_state(
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    centre: torch.Tensor | None,
    feature_map: str,
) -> None:
    """Fill the state `(B * H, K * V + K)` of k and of v about its mean, and `mean` `(B, H, V)`.

    And `centre`, where given, with the mean in the type of sums. The feature map is not "signed".
    """
    B, H, M, K = k.shape
    V = v.shape[-1]
    _, partial = launch_partial_state(k, v, PLAIN, feature_map, sum_keys=True, sum_values=True)
    launch = plan_centre(B * H, partial.shape[2], M, K, V, v.dtype)
    launch(partial, state, mean, centre)


def launch_centre_gradient(
    dstate: torch.Tensor,
    state: torch.Tensor,
    centre: torch.Tensor,
    dmean: torch.Tensor,
    tokens: int,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `launch_grad_key` takes with a factor of 1: the gradient of the state, and the share.

    dstate: That of the scaled state about the mean. dmean: `(B, H, V)`, contiguous.
    """
    states, V = centre.shape
    K = state.shape[1] // (V + 1)
    operand, share = torch.empty_like(state), torch.empty_like(centre)
    launch = plan_centre_gradient(states, tokens, K, V, dmean.dtype, factor)
    launch(dstate, state, centre, dmean, operand, share)
    return operand, share

"""The specification: the operators in eager PyTorch, on any device, differentiable.

It computes in float32 at least (float64 stays float64) and returns the input dtype. Every kernel
is held to it, and it runs wherever the kernels do not. `state_reference` is one pass over the keys,
`apply_reference` one over the queries; the operators are made of the two.
"""

import torch

from .autocast import without_autocast
from .feature_maps import FEATURE_MAPS
from .layout import in_order_of
from .packing import attend_packed
from .rotary import Rotary, rotate
from .state import State


def state_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str | None,
    rotary: Rotary | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> State:
    """`kv = sum w rotate(phi(k))^T v`, `key_sum = sum w phi(k)` and the number of keys there."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    with without_autocast(k):
        k, v = k.to(dtype), v.to(dtype)
        count = k.new_full((k.shape[0],), k.shape[2])
        if key_mask is not None:
            # Selected, not multiplied: what is not there may be NaN, and 0 * NaN is NaN.
            absent = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(absent, 0), v.masked_fill(absent, 0)
            count = key_mask.sum(-1, dtype=dtype)
        phi_k = FEATURE_MAPS[feature_map](k)
        if key_weight is not None:
            per_head = key_weight if key_weight.dim() == 3 else key_weight[:, None]
            phi_k = phi_k * per_head.to(dtype).unsqueeze(-1)
        if key_mask is not None:
            phi_k = phi_k.masked_fill(absent, 0)
        return State(rotate(phi_k, rotary).transpose(-1, -2) @ v, phi_k.sum(-2), count)


def apply_reference(
    q: torch.Tensor,
    state: State,
    feature_map: str | None,
    normalizer: str,
    eps: float,
    rotary: Rotary | None = None,
) -> torch.Tensor:
    """`rotate(phi(q)) [kv / M] / (phi(q) . [key_sum / M] + eps)`, M keys; or `.../ sum` alike."""
    with without_autocast(q):
        phi_q = FEATURE_MAPS[feature_map](q.to(state.kv.dtype))
        kv, key_sum = (_for_each_head(x, q.shape[1]) for x in (state.kv, state.key_sum))
        M = state.count.clamp(min=1)[:, None, None, None]
        # Both normalizers divide by M, so that sums stay near one; only eps tells them apart.
        denominator = phi_q @ (key_sum.unsqueeze(-1) / M)
        denominator = denominator + (eps if normalizer == "mean" else eps / M)
        # No keys, no output: 0, not 0 / 0 where eps = 0.
        denominator = denominator + (state.count == 0)[:, None, None, None]
        o = rotate(phi_q, rotary) @ (kv / M) / denominator
        return in_order_of(q, o.to(q.dtype))


def linear_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str | None,
    normalizer: str,
    eps: float,
    rotary: Rotary | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The state of the keys, applied to the queries."""

    def attend(q, k, v, rotary, key_weight, key_mask):
        state = state_reference(k, v, feature_map, rotary, key_weight, key_mask)
        return apply_reference(q, state, feature_map, normalizer, eps, rotary)

    if cu_seqlens is not None:
        return attend_packed(attend, cu_seqlens, q, k, v, rotary, key_weight, key_mask)
    return attend(q, k, v, rotary, key_weight, key_mask)


def simple_la_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str | None,
    scale: float,
    rotary: Rotary | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotate(phi(q)) [scale kv]`."""

    def attend(q, k, v, rotary, key_weight, key_mask):
        kv = state_reference(k, v, feature_map, rotary, key_weight, key_mask).kv * scale
        with without_autocast(q):
            phi_q = rotate(FEATURE_MAPS[feature_map](q.to(kv.dtype)), rotary)
            o = phi_q @ _for_each_head(kv, q.shape[1])
            return in_order_of(q, o.to(q.dtype))

    if cu_seqlens is not None:
        return attend_packed(attend, cu_seqlens, q, k, v, rotary, key_weight, key_mask)
    return attend(q, k, v, rotary, key_weight, key_mask)


def _for_each_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`x` `(B, Hk, ...)` repeated for the query heads: head h reads key head h // (Hq // Hk)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

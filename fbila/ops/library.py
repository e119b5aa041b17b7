"""The operators as torch.library ops: schemas, device implementations, fake kernels.

`fbila::linear_attn` is what users' graphs show; it is differentiable. `..._forward` and
`..._backward` are the two passes it is made of, and are not. Both operators are one op here:
`normalizer` is "mean", "sum" or, for simple_la, "none". float64 scalars stay float64. key_weight is
`(B, Hk, M)`, key_mask `(B, M)` in the dtype of k, 0 where a key is absent, and count `(B,)` the
number of keys that it leaves.

The Triton kernels are imported at the first launch, so that importing fbila needs no triton.
"""

from typing import NamedTuple

import torch

from .layout import empty_like_order

LIBRARY = torch.library.Library("fbila", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? key_weight, Tensor? key_mask, Tensor? count"
_OPTIONS = "str feature_map, str normalizer, float scale, float eps"
LIBRARY.define(f"linear_attn({_INPUTS}, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"linear_attn_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_attn_backward(Tensor do, {_INPUTS}, Tensor state, Tensor inverse, {_OPTIONS}, "
    "bool[] needs_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)


class Keys(NamedTuple):
    """The keys' options, as the kernels take them."""

    weight: torch.Tensor | None
    mask: torch.Tensor | None
    total: torch.Tensor | None


def _scalars(normalizer: str, scale: float, eps: float, M: int) -> tuple[float, float]:
    """(factor of S and z, eps beside it). Dividing by M keeps float16 operands in range."""
    if normalizer == "none":
        return scale, 0.0
    return 1.0 / M, eps if normalizer == "mean" else eps / M


def _sum_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_state(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, _, K = k.shape
    return k.new_empty(B * H, K * v.shape[-1] + K, dtype=_sum_dtype(k))


def _empty_inverse(q: torch.Tensor, normalizer: str) -> torch.Tensor:
    """For 1 / denominator `(B, H, N)`; empty where there is none."""
    B, H, N = q.shape[:3]
    return q.new_empty((0,) if normalizer == "none" else (B, H, N), dtype=_sum_dtype(q))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o `(B, H, N, V)` and what the backward pass needs: the state and 1 / denominator."""
    o = empty_like_order(q, v.shape[-1])
    inverse = _empty_inverse(q, normalizer)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), _empty_state(k, v).zero_(), inverse.zero_()
    keys = Keys(key_weight, key_mask, count)
    return o, _forward(q, k, v, keys, o, inverse, feature_map, normalizer, scale, eps), inverse


def inference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """o alone, and nothing kept."""
    o = empty_like_order(q, v.shape[-1])
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_()
    keys = Keys(key_weight, key_mask, count)
    _forward(q, k, v, keys, o, None, feature_map, normalizer, scale, eps)
    return o


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    o: torch.Tensor,
    inverse: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    from .kernels.output import launch_output
    from .kernels.state import launch_state

    assert keys.mask is None or keys.mask.dtype == k.dtype
    normalize = normalizer != "none"
    factor, eps = _scalars(normalizer, scale, eps, k.shape[2])
    state = launch_state(k, v, keys.weight, keys.mask, feature_map)
    launch_output(
        q, state, o, feature_map, normalize, factor, eps,
        inverse=inverse if normalize else None, count=keys.total, mean=normalizer == "mean",
    )  # fmt: skip
    return state


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor | None,
    state: torch.Tensor,
    inverse: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
    needs_grad: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv and dw; those that nobody needs are empty (the keys' are made together)."""
    dq, dk, dv, dw = _empty_gradients(q, k, v, key_weight, needs_grad)
    M = k.shape[2]
    if do.numel() == 0 or M == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dw.zero_()
    from .kernels.grad_key import launch_grad_key
    from .kernels.grad_query import launch_grad_query

    normalize = normalizer != "none"
    factor, _ = _scalars(normalizer, scale, eps, M)
    if normalizer != "mean":
        count = None
    dstate = launch_grad_query(
        q, do, state, inverse if normalize else None, count, dq, feature_map, factor
    )
    if needs_grad[1]:
        launch_grad_key(
            k, v, dstate, dk, dv, feature_map, normalize, factor,
            count=count, weight=key_weight, mask=key_mask,
            dweight=None if key_weight is None else dw,
        )  # fmt: skip
    return dq, dk, dv, dw


def _empty_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    needs_grad: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = empty_like_order(q, q.shape[-1])
    none = k.new_empty((0,), dtype=_sum_dtype(k))
    if not needs_grad[1]:
        return dq, k.new_empty(0), v.new_empty(0), none
    dw = none if key_weight is None else k.new_empty(k.shape[:3], dtype=_sum_dtype(k))
    return dq, empty_like_order(k, k.shape[-1]), empty_like_order(v, v.shape[-1]), dw


for _name, _implementation in (
    ("linear_attn", inference),
    ("linear_attn_forward", forward),
    ("linear_attn_backward", backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)


@torch.library.register_fake("fbila::linear_attn", lib=LIBRARY)
def _(q, k, v, key_weight, key_mask, count, feature_map, normalizer, scale, eps):
    return empty_like_order(q, v.shape[-1])


@torch.library.register_fake("fbila::linear_attn_forward", lib=LIBRARY)
def _(q, k, v, key_weight, key_mask, count, feature_map, normalizer, scale, eps):
    return empty_like_order(q, v.shape[-1]), _empty_state(k, v), _empty_inverse(q, normalizer)


@torch.library.register_fake("fbila::linear_attn_backward", lib=LIBRARY)
def _(do, q, k, v, key_weight, key_mask, count, state, inverse, *options):
    return _empty_gradients(q, k, v, key_weight, options[-1])

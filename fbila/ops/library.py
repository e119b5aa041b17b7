"""The operators as torch.library ops: schemas, device implementations, fake kernels.

`fbila::linear_attn` is what users' graphs show; it is differentiable. `..._forward` and
`..._backward` are the two passes it is made of, and are not. Both operators are one op here:
`normalizer` is "mean", "sum" or, for simple_la, "none". float64 scalars stay float64. The tensors
of the options are as `kernel_inputs.py` makes them.

The Triton kernels are imported at the first launch, so that importing fbila needs no triton.
"""

from typing import TYPE_CHECKING, cast

import torch

from .feature_maps import feature_dim
from .layout import empty_like_order
from .replay import replayed

if TYPE_CHECKING:
    from .kernels.side import Side

LIBRARY = torch.library.Library("fbila", "DEF")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_weight, Tensor? key_mask, Tensor? count, "
    "Tensor? table, Tensor? cu_seqlens"
)
_OPTIONS = "str feature_map, str normalizer, str rotary, float scale, float eps"
LIBRARY.define(f"linear_attn({_INPUTS}, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"linear_attn_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_attn_backward(Tensor do, {_INPUTS}, Tensor state, Tensor inverse, {_OPTIONS}, "
    "bool[] needs_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)


def scalars(normalizer: str, scale: float, eps: float, M: int) -> tuple[float, float]:
    """(factor of S and z, eps beside it). Dividing by M keeps float16 operands in range."""
    if normalizer == "none":
        return scale, 0.0
    return 1.0 / M, eps if normalizer == "mean" else eps / M


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums over `x` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_state(
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    B, H = k.shape[:2]
    K = feature_dim(k.shape[3], feature_map)
    states = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(states * H, K * v.shape[-1] + K, dtype=sum_dtype(k))


def empty_inverse(q: torch.Tensor, normalizer: str) -> torch.Tensor:
    """For 1 / denominator `(B, H, N)`; empty where there is none."""
    B, H, N = q.shape[:3]
    return q.new_empty((0,) if normalizer == "none" else (B, H, N), dtype=sum_dtype(q))


@replayed
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor | None,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    rotary: str,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o `(B, H, N, V)` and what the backward pass needs: the state and 1 / denominator."""
    o = empty_like_order(q, v.shape[-1])
    inverse = empty_inverse(q, normalizer)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), empty_state(k, v, feature_map, cu_seqlens).zero_(), inverse.zero_()
    sides = _sides(key_weight, key_mask, table, cu_seqlens, rotary)
    state = forward_of(
        q, k, v, *sides, count, o, inverse, feature_map, normalizer, scale, eps
    )  # fmt: skip
    # It is kept, beside 1 / denominator.
    return o, cast("torch.Tensor", state), inverse


@replayed
def inference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    count: torch.Tensor | None,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    rotary: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """o alone, and nothing kept."""
    o = empty_like_order(q, v.shape[-1])
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_()
    sides = _sides(key_weight, key_mask, table, cu_seqlens, rotary)
    forward_of(q, k, v, *sides, count, o, None, feature_map, normalizer, scale, eps)
    return o


def _sides(
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    rotary: str,
) -> tuple["Side", "Side"]:
    """The options of the queries and of the keys."""
    from .kernels.side import PLAIN, Side

    query = keys = PLAIN
    if table is not None or cu_seqlens is not None:
        query = keys = Side(table=table, cu_seqlens=cu_seqlens, rotary=rotary)
    if key_weight is not None or key_mask is not None:
        keys = query._replace(weight=key_weight, mask=key_mask)
    return query, keys


def forward_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query: "Side",
    keys: "Side",
    count: torch.Tensor | None,
    o: torch.Tensor,
    inverse: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor | None:
    """Fill o and, where given, 1 / denominator; return the state, which is not kept without."""
    from .kernels import short
    from .kernels.output import launch_output
    from .kernels.side import PLAIN
    from .kernels.state import launch_state

    normalize = normalizer != "none"
    factor, eps = scalars(normalizer, scale, eps, k.shape[2])
    if query is keys is PLAIN and short.serves(q, k, v, feature_map):
        state = None if inverse is None else empty_state(k, v, feature_map)
        short.launch_short(
            q, k, v, o, state, inverse if normalize else None, feature_map, normalize, factor, eps
        )
        return state
    state = launch_state(k, v, keys, feature_map)
    launch_output(
        q, state, o, feature_map, normalize, factor, eps,
        side=query, group=q.shape[1] // k.shape[1],
        inverse=inverse if normalize else None, count=count, mean=normalizer == "mean",
    )  # fmt: skip
    return state


@replayed
def backward(
    do, q, k, v, key_weight, key_mask, count, table, cu_seqlens, state, inverse, feature_map,
    normalizer, rotary, scale, eps, needs_grad,
):  # fmt: skip
    """dq, dk, dv and dw; those that nobody needs are empty (the keys' are made together)."""
    dq, dk, dv, dw = _empty_gradients(q, k, v, key_weight, needs_grad)
    _fill_gradients(
        do, q, k, v, key_weight, key_mask, count, table, cu_seqlens, state, inverse, feature_map,
        normalizer, rotary, scale, needs_grad, dq, dk, dv, dw,
    )  # fmt: skip
    return dq, dk, dv, dw


@replayed
def backward_into(do, q, k, v, key_weight, *others):
    """`backward` of all inputs, into dq, dk and dv, which are last; dw."""
    *others, _, needs_grad, dq, dk, dv = others
    dw = _empty_weight_gradient(k, key_weight)
    _fill_gradients(do, q, k, v, key_weight, *others, needs_grad, dq, dk, dv, dw)
    return (dw,)


def _fill_gradients(
    do, q, k, v, key_weight, key_mask, count, table, cu_seqlens, state, inverse, feature_map,
    normalizer, rotary, scale, needs_grad, dq, dk, dv, dw,
):  # fmt: skip
    if do.numel() == 0 or k.shape[2] == 0:
        for gradient in (dq, dk, dv, dw):
            gradient.zero_()
        return
    query, keys = _sides(key_weight, key_mask, table, cu_seqlens, rotary)
    backward_of(
        do, q, k, v, query, keys, count, state, inverse, dq, dk, dv,
        None if key_weight is None else dw,
        feature_map, normalizer, scale, needs_keys=needs_grad[1],
    )  # fmt: skip


def backward_of(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query: "Side",
    keys: "Side",
    count: torch.Tensor | None,
    state: torch.Tensor,
    inverse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dw: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    *,
    needs_keys: bool,
    query_dw: torch.Tensor | None = None,
) -> None:
    """Fill dq and, where wanted, dk, dv and dw; query_dw is for what dw would be of queries."""
    from .kernels.grad_key import launch_grad_key
    from .kernels.grad_query import launch_grad_query

    normalize = normalizer != "none"
    factor, _ = scalars(normalizer, scale, 0.0, k.shape[2])
    if normalizer != "mean":
        count = None
    dstate = launch_grad_query(
        q, do, state, inverse if normalize else None, count, dq, query, k.shape[1], feature_map,
        factor, dweight=query_dw,
    )  # fmt: skip
    if needs_keys:
        launch_grad_key(
            k, v, dstate, dk, dv, keys, feature_map, normalize, factor,
            count=count, dweight=dw,
        )  # fmt: skip


def _empty_gradients(q, k, v, key_weight, needs_grad):
    dq = empty_like_order(q, q.shape[-1])
    if not needs_grad[1]:
        return dq, k.new_empty(0), v.new_empty(0), _empty_weight_gradient(k, None)
    dk, dv = (empty_like_order(x, x.shape[-1]) for x in (k, v))
    return dq, dk, dv, _empty_weight_gradient(k, key_weight)


def _empty_weight_gradient(k: torch.Tensor, key_weight: torch.Tensor | None) -> torch.Tensor:
    return k.new_empty((0,) if key_weight is None else k.shape[:3], dtype=sum_dtype(k))


for _name, _implementation in (
    ("linear_attn", inference),
    ("linear_attn_forward", forward),
    ("linear_attn_backward", backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)


@torch.library.register_fake("fbila::linear_attn", lib=LIBRARY)
def _(q, k, v, *options):
    return empty_like_order(q, v.shape[-1])


@torch.library.register_fake("fbila::linear_attn_forward", lib=LIBRARY)
def _(q, k, v, key_weight, key_mask, count, table, cu_seqlens, feature_map, normalizer, *scalars):
    o, inverse = empty_like_order(q, v.shape[-1]), empty_inverse(q, normalizer)
    return o, empty_state(k, v, feature_map, cu_seqlens), inverse


@torch.library.register_fake("fbila::linear_attn_backward", lib=LIBRARY)
def _(do, q, k, v, key_weight, *options):
    return _empty_gradients(q, k, v, key_weight, options[-1])

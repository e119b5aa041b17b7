"""The operators as torch.library ops: schemas, device implementations, fake kernels.

`fbila::linear_attn` is what users' graphs show; it is differentiable. `..._forward` and
`..._backward` are the two passes it is made of, and are not. Both operators are one op here:
`normalizer` is "mean", "sum" or, for simple_la, "none". float64 scalars stay float64.

The Triton kernels are imported at the first launch, so that importing fbila needs no triton.
"""

import torch

from .layout import empty_like_order

LIBRARY = torch.library.Library("fbila", "DEF")
_OPTIONS = "str feature_map, str normalizer, float scale, float eps"
LIBRARY.define(f"linear_attn(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> Tensor")
LIBRARY.define(
    f"linear_attn_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "linear_attn_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor state, Tensor inverse, "
    f"{_OPTIONS}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def _scalars(normalizer: str, scale: float, eps: float, M: int) -> tuple[float, float]:
    """(factor of S and z, eps beside it). Dividing by M keeps float16 operands in range."""
    if normalizer == "none":
        return scale, 0.0
    return 1.0 / M, eps if normalizer == "mean" else eps / M


def _sum_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, _, K = k.shape
    return q.new_empty(B * H, K * v.shape[-1] + K, dtype=_sum_dtype(q))


def _empty_inverse(q: torch.Tensor, normalizer: str) -> torch.Tensor:
    """For 1 / denominator `(B, H, N)`; empty where there is none."""
    B, H, N = q.shape[:3]
    return q.new_empty((0,) if normalizer == "none" else (B, H, N), dtype=_sum_dtype(q))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o `(B, H, N, V)` and what the backward pass needs: the state and 1 / denominator."""
    o = empty_like_order(q, v.shape[-1])
    inverse = _empty_inverse(q, normalizer)
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_(), _empty_state(q, k, v).zero_(), inverse.zero_()
    return o, _forward(q, k, v, o, inverse, feature_map, normalizer, scale, eps), inverse


def inference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """o alone, and nothing kept."""
    o = empty_like_order(q, v.shape[-1])
    if o.numel() == 0 or k.shape[2] == 0:
        return o.zero_()
    _forward(q, k, v, o, None, feature_map, normalizer, scale, eps)
    return o


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    inverse: torch.Tensor | None,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    from .kernels.output import launch_output
    from .kernels.state import launch_state

    normalize = normalizer != "none"
    factor, eps = _scalars(normalizer, scale, eps, k.shape[2])
    with _on_device_of(q):
        state = launch_state(k, v, None, feature_map)
        launch_output(
            q, state, o, inverse if normalize else None, feature_map, normalize, factor, eps
        )
    return state


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    inverse: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
    needs_grad: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv; those that nobody needs are empty (dk and dv are made together)."""
    dq, dk, dv = _empty_gradients(q, k, v, needs_grad)
    M = k.shape[2]
    if do.numel() == 0 or M == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    from .kernels.grad_key import launch_grad_key
    from .kernels.grad_query import launch_grad_query

    normalize = normalizer != "none"
    factor, _ = _scalars(normalizer, scale, eps, M)
    with _on_device_of(q):
        dstate = launch_grad_query(
            q, do, state, inverse if normalize else None, dq, feature_map, factor
        )
        if needs_grad[1]:
            launch_grad_key(k, v, dstate, dk, dv, feature_map, normalize, factor)
    return dq, dk, dv


def _empty_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needs_grad: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = empty_like_order(q, q.shape[-1])
    if not needs_grad[1]:
        return dq, k.new_empty(0), v.new_empty(0)
    return dq, empty_like_order(k, k.shape[-1]), empty_like_order(v, v.shape[-1])


def _on_device_of(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensors' own."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


for _name, _implementation in (
    ("linear_attn", inference),
    ("linear_attn_forward", forward),
    ("linear_attn_backward", backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)


@torch.library.register_fake("fbila::linear_attn", lib=LIBRARY)
def _(q, k, v, feature_map, normalizer, scale, eps):
    return empty_like_order(q, v.shape[-1])


@torch.library.register_fake("fbila::linear_attn_forward", lib=LIBRARY)
def _(q, k, v, feature_map, normalizer, scale, eps):
    return empty_like_order(q, v.shape[-1]), _empty_state(q, k, v), _empty_inverse(q, normalizer)


@torch.library.register_fake("fbila::linear_attn_backward", lib=LIBRARY)
def _(do, q, k, v, state, inverse, feature_map, normalizer, scale, eps, needs_grad):
    return _empty_gradients(q, k, v, needs_grad)

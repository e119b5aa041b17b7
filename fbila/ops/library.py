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
LIBRARY.define(f"linear_attn_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "linear_attn_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor state, "
    f"{_OPTIONS}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def _scalars(normalizer: str, scale: float, eps: float, M: int) -> tuple[float, float]:
    """(factor of S and z, eps beside it). Dividing by M keeps float16 operands in range."""
    if normalizer == "none":
        return scale, 0.0
    return 1.0 / M, eps if normalizer == "mean" else eps / M


def _empty_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    B, H, _, K = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B * H, K * v.shape[-1] + K, dtype=dtype)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o `(B, H, N, V)` and the state `(B * H, K * V + K)` that the backward pass needs."""
    o = empty_like_order(q, v.shape[-1])
    M = k.shape[2]
    if o.numel() == 0 or M == 0:
        return o.zero_(), _empty_state(q, k, v).zero_()
    from .kernels.output import launch_output
    from .kernels.state import launch_state

    normalize = normalizer != "none"
    with _on_device_of(q):
        state = launch_state(k, v, feature_map, normalize)
        factor, eps = _scalars(normalizer, scale, eps, M)
        launch_output(q, state, o, feature_map, normalize, factor, eps)
    return o, state


def inference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    return forward(q, k, v, feature_map, normalizer, scale, eps)[0]


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
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
    factor, eps = _scalars(normalizer, scale, eps, M)
    with _on_device_of(q):
        dstate = launch_grad_query(q, do, state, dq, feature_map, normalize, factor, eps)
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
    return empty_like_order(q, v.shape[-1]), _empty_state(q, k, v)


@torch.library.register_fake("fbila::linear_attn_backward", lib=LIBRARY)
def _(do, q, k, v, state, feature_map, normalizer, scale, eps, needs_grad):
    return _empty_gradients(q, k, v, needs_grad)

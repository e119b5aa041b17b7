"""`linear_attn_state` and `linear_attn_apply` as torch.library ops, and their gradients.

A state is one tensor `(B * Hk, K * V + K)` here: S row by row, then z. The tensors of the options
are as `kernel_inputs.py` makes them. Backward passes are ops of their own; that they cannot be
differentiated is said, as in `autograd.py`.
"""

import torch

from .autograd import differentiable_by, needs_gradient, ordinary, refuse_second_derivative
from .feature_maps import feature_dim
from .inlining import inline
from .layout import empty_like_order
from .library import LIBRARY, empty_inverse, empty_state, sum_dtype
from .replay import replayed

_KEYS = "Tensor k, Tensor v, Tensor? key_weight, Tensor? key_mask, Tensor? table"
_QUERY = "Tensor q, Tensor state, Tensor? count, Tensor? table"
_APPLY = "str feature_map, str normalizer, str rotary, float eps"
LIBRARY.define(f"linear_attn_state({_KEYS}, str feature_map, str rotary) -> Tensor")
LIBRARY.define(
    f"linear_attn_state_backward(Tensor dstate, {_KEYS}, str feature_map, str rotary) -> "
    "(Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"linear_attn_apply({_QUERY}, {_APPLY}) -> Tensor")
LIBRARY.define(f"linear_attn_apply_forward({_QUERY}, {_APPLY}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"linear_attn_apply_backward(Tensor do, {_QUERY}, Tensor inverse, {_APPLY}) -> (Tensor, Tensor)"
)


@replayed
def state_of(k, v, key_weight, key_mask, table, feature_map, rotary):
    from .kernels.side import Side
    from .kernels.state import launch_state

    if k.shape[2] == 0 or k.numel() == 0:
        return empty_state(k, v, feature_map).zero_()
    side = Side(weight=key_weight, mask=key_mask, table=table, rotary=rotary)
    return launch_state(k, v, side, feature_map)


@replayed
def state_backward(dstate, k, v, key_weight, key_mask, table, feature_map, rotary):
    """dk, dv and dw, which is empty without a weight."""
    from .kernels.grad_key import launch_grad_key
    from .kernels.side import Side

    dk, dv, dw = _empty_key_gradients(k, v, key_weight)
    if k.numel() == 0:
        return dk.zero_(), dv.zero_(), dw.zero_()
    side = Side(weight=key_weight, mask=key_mask, table=table, rotary=rotary)
    launch_grad_key(
        k, v, dstate.contiguous(), dk, dv, side, feature_map, True, 1.0,
        dweight=None if key_weight is None else dw,
    )  # fmt: skip
    return dk, dv, dw


def _empty_key_gradients(k, v, key_weight):
    shape = (0,) if key_weight is None else k.shape[:3]
    dw = k.new_empty(shape, dtype=sum_dtype(k))
    return empty_like_order(k, k.shape[-1]), empty_like_order(v, v.shape[-1]), dw


def _value_dim(q, state, feature_map):
    return state.shape[-1] // feature_dim(q.shape[-1], feature_map) - 1


@replayed
def apply(q, state, count, table, feature_map, normalizer, rotary, eps):
    """o `(B, H, N, V)`."""
    return _apply(q, state, count, table, None, feature_map, normalizer, rotary, eps)


@replayed
def apply_forward(q, state, count, table, feature_map, normalizer, rotary, eps):
    """o and 1 / denominator `(B, H, N)`."""
    inverse = empty_inverse(q, normalizer)
    o = _apply(q, state, count, table, inverse, feature_map, normalizer, rotary, eps)
    return o, inverse


def _apply(q, state, count, table, inverse, feature_map, normalizer, rotary, eps):
    from .kernels.output import launch_output
    from .kernels.side import Side

    o = empty_like_order(q, _value_dim(q, state, feature_map))
    if o.numel() == 0:
        return o
    launch_output(
        q, state, o, feature_map, True, 1.0, eps, side=Side(table=table, rotary=rotary),
        group=_group(q, state), inverse=inverse, count=count, mean=normalizer == "mean",
    )  # fmt: skip
    return o


def _group(q, state):
    """Query heads that share a key head."""
    return q.shape[0] * q.shape[1] // state.shape[0]


@replayed
def apply_backward(do, q, state, count, table, inverse, feature_map, normalizer, rotary, eps):
    """dq and the state's gradient."""
    from .kernels.grad_query import launch_grad_query
    from .kernels.side import Side

    dq = empty_like_order(q, q.shape[-1])
    if do.numel() == 0:
        return dq.zero_(), torch.zeros_like(state)
    mean = normalizer == "mean"
    dstate = launch_grad_query(
        q, do, state, inverse, count if mean else None, dq, Side(table=table, rotary=rotary),
        q.shape[1] // _group(q, state), feature_map, 1.0,
    )  # fmt: skip
    if mean:
        # That of S' = S / count, so far.
        dstate.view(q.shape[0], -1).div_(count.clamp(min=1)[:, None])
    return dq, dstate


for _name, _implementation in (
    ("linear_attn_state", state_of),
    ("linear_attn_state_backward", state_backward),
    ("linear_attn_apply", apply),
    ("linear_attn_apply_forward", apply_forward),
    ("linear_attn_apply_backward", apply_backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)
    inline(_name, _implementation)


@torch.library.register_fake("fbila::linear_attn_state", lib=LIBRARY)
def _(k, v, key_weight, key_mask, table, feature_map, rotary):
    return empty_state(k, v, feature_map)


@torch.library.register_fake("fbila::linear_attn_state_backward", lib=LIBRARY)
def _(dstate, k, v, key_weight, *options):
    return _empty_key_gradients(k, v, key_weight)


@torch.library.register_fake("fbila::linear_attn_apply", lib=LIBRARY)
def _(q, state, count, table, feature_map, *options):
    return empty_like_order(q, _value_dim(q, state, feature_map))


@torch.library.register_fake("fbila::linear_attn_apply_forward", lib=LIBRARY)
def _(q, state, count, table, feature_map, normalizer, *options):
    o = empty_like_order(q, _value_dim(q, state, feature_map))
    return o, empty_inverse(q, normalizer)


@torch.library.register_fake("fbila::linear_attn_apply_backward", lib=LIBRARY)
def _(do, q, state, *options):
    return empty_like_order(q, q.shape[-1]), torch.empty_like(state)


class LinearAttnState(torch.autograd.Function):
    """`fbila::linear_attn_state` and its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.options = arguments[5:]
        ctx.save_for_backward(*arguments[:5])
        if ordinary(*arguments[:5]):
            return state_of(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.linear_attn_state(*arguments)

    @staticmethod
    def backward(ctx, dstate):
        # Asked for once, as checkpoints of activations want it.
        inputs = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and ordinary(dstate, *inputs)
        run = state_backward if unseen else torch.ops.fbila.linear_attn_state_backward
        gradients = run(dstate, *inputs, *ctx.options)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(x if needed else None for x, needed in wanted), *[None] * 4)


class LinearAttnApply(torch.autograd.Function):
    """`fbila::linear_attn_apply` and its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.options = arguments[4:]
        if ordinary(*arguments[:4]):
            o, inverse = apply_forward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, inverse = torch.ops.fbila.linear_attn_apply_forward(*arguments)
        ctx.save_for_backward(*arguments[:4], inverse)
        return o

    @staticmethod
    def backward(ctx, do):
        # Asked for once, as checkpoints of activations want it.
        inputs = ctx.saved_tensors
        unseen = not torch.is_grad_enabled() and ordinary(do, *inputs)
        run = apply_backward if unseen else torch.ops.fbila.linear_attn_apply_backward
        gradients = run(do, *inputs, *ctx.options)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(x if needed else None for x, needed in wanted), *[None] * 6)


differentiable_by("linear_attn_state", LinearAttnState.apply, state_of)
differentiable_by("linear_attn_apply", LinearAttnApply.apply, apply)
refuse_second_derivative("linear_attn_state_backward", "linear_attn_state")
refuse_second_derivative("linear_attn_apply_backward", "linear_attn_apply")


def linear_attn_state(k, v, key_weight, key_mask, table, *options):
    """`fbila::linear_attn_state`, straight away where nothing stands in between."""
    tensors = (k, v, key_weight, key_mask, table)
    if not ordinary(*tensors):
        return torch.ops.fbila.linear_attn_state(*tensors, *options)
    run = LinearAttnState.apply if needs_gradient(*tensors) else state_of
    return run(*tensors, *options)


def linear_attn_apply(q, state, count, table, *options):
    """`fbila::linear_attn_apply`, straight away where nothing stands in between."""
    tensors = (q, state, count, table)
    if not ordinary(*tensors):
        return torch.ops.fbila.linear_attn_apply(*tensors, *options)
    run = LinearAttnApply.apply if needs_gradient(*tensors) else apply
    return run(*tensors, *options)

"""`focused_la` as a torch.library op, and its gradient.

The kernels of `linear_attn` compute f where they compute phi, from two numbers that all heads of a
token share; `kernels/focus.py` finds those before, and takes the gradient of f to that of x after.
`columns` is 1 / softplus(scale), `(H, K)` in the type of sums; mask and total are of the keys.
`shift`, `(M, H, K)`, is added to the keys of every item.
"""

import torch

from .autograd import differentiable_by, needs_gradient, ordinary, refuse_second_derivative
from .inlining import inline
from .layout import empty_like_order
from .library import LIBRARY, backward_of, empty_inverse, empty_state, forward_of
from .linear import column_sums
from .places import gradients_in, places
from .replay import replayed

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor columns, Tensor? key_mask, Tensor? total, Tensor? shift"
)
_OPTIONS = "float power, float eps"
LIBRARY.define(f"focused_la({_INPUTS}, {_OPTIONS}) -> Tensor")
LIBRARY.define(
    f"focused_la_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"focused_la_backward(Tensor do, {_INPUTS}, Tensor state, Tensor inverse, Tensor q_rows, "
    f"Tensor k_rows, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@replayed
def inference(q, k, v, columns, key_mask, total, shift, power, eps):
    """o `(B, H, N, V)`."""
    return _forward(q, k, v, columns, key_mask, total, shift, None, power, eps)[0]


@replayed
def forward(q, k, v, columns, key_mask, total, shift, power, eps):
    """o, and for the backward pass the state, 1 / denominator and the rows of q and k."""
    inverse = empty_inverse(q, "mean")
    o, state, q_rows, k_rows = _forward(
        q, k, v, columns, key_mask, total, shift, inverse, power, eps
    )
    return o, state, inverse, q_rows, k_rows


def _forward(q, k, v, columns, key_mask, total, shift, inverse, power, eps):
    from .kernels.focus import launch_focus_rows

    o = empty_like_order(q, v.shape[-1])
    if o.numel() == 0 or k.shape[2] == 0:
        if inverse is not None:
            inverse.zero_()
        rows = (_empty_rows(x, columns).zero_() for x in (q, k))
        return o.zero_(), empty_state(k, v, "focused").zero_(), *rows
    q_rows = launch_focus_rows(q, columns, None, power)
    k_rows = launch_focus_rows(k, columns, key_mask, power, shift)
    sides = _sides(columns, key_mask, shift, q_rows, k_rows, power)
    state = forward_of(q, k, v, *sides, total, o, inverse, "focused", "mean", 1.0, eps)
    return o, state, q_rows, k_rows


def _empty_rows(x, columns):
    return columns.new_empty(x.shape[0], 3, x.shape[2])


def _sides(columns, key_mask, shift, q_rows, k_rows, power):
    from .kernels.side import Side

    query = Side(rows=q_rows, columns=columns, power=power)
    return query, query._replace(rows=k_rows, mask=key_mask, shift=shift)


def backward(
    do, q, k, v, columns, key_mask, total, shift, state, inverse, q_rows, k_rows, power, eps,
    into=None,
):  # fmt: skip
    """dq, dk, dv, which may be given as `into`, and the gradient of columns."""
    if do.numel() == 0 or k.shape[2] == 0:
        made = _empty_gradients(q, k, v, columns)
        return tuple([x.zero_() for x in (*(into or made[:3]), made[3])])
    inputs = (do, q, k, v, columns, key_mask, total, shift, state, inverse, q_rows, k_rows, power)
    if into is None:
        dq, dk, dv, q_along, k_along = _to_features(*inputs)
    else:
        dq, dk, dv = into
        q_along, k_along = _into_features(*inputs, dq, dk, dv)
    # So far dq and dk are those of f(q) and f(k), times these.
    of_queries = _through(q, dq, columns, q_rows, q_along.sum(1), None, None, power).sum(0)
    of_keys = _through(k, dk, columns, k_rows, k_along.sum(1), key_mask, shift, power).sum(0)
    return dq, dk, dv, of_queries + of_keys


@replayed
def _to_features(do, q, k, v, columns, *others):
    """f(q) df(q), f(k) df(k) and dv, and the sums over channels of the first two."""
    *gradients, _ = _empty_gradients(q, k, v, columns)
    return *gradients, *_fill_features(do, q, k, v, columns, *others, *gradients)


@replayed
def _into_features(*arguments):
    """The same into memory that is given; the sums."""
    return _fill_features(*arguments)


def _fill_features(
    do, q, k, v, columns, key_mask, total, shift, state, inverse, q_rows, k_rows, power, dq, dk, dv
):
    sides = _sides(columns, key_mask, shift, q_rows, k_rows, power)
    q_along, k_along = (columns.new_empty(x.shape[:3]) for x in (q, k))
    backward_of(
        do, q, k, v, *sides, total, state, inverse, dq, dk, dv, k_along, "focused", "mean", 1.0,
        needs_keys=True, query_dw=q_along,
    )  # fmt: skip
    return q_along, k_along


@replayed
def _through(x, df, columns, rows, along, mask, shift, power):
    from .kernels.grad_focus import launch_focus_gradient

    return launch_focus_gradient(x, df, columns, rows, along, mask, power, shift)


def _empty_gradients(q, k, v, columns):
    gradients = (empty_like_order(x, x.shape[-1]) for x in (q, k, v))
    return (*gradients, torch.empty_like(columns))


for _name, _implementation in (
    ("focused_la", inference),
    ("focused_la_forward", forward),
    ("focused_la_backward", backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)
    inline(_name, _implementation)


@torch.library.register_fake("fbila::focused_la", lib=LIBRARY)
def _(q, k, v, *options):
    return empty_like_order(q, v.shape[-1])


@torch.library.register_fake("fbila::focused_la_forward", lib=LIBRARY)
def _(q, k, v, columns, *options):
    o, inverse = empty_like_order(q, v.shape[-1]), empty_inverse(q, "mean")
    return (
        o,
        empty_state(k, v, "focused"),
        inverse,
        _empty_rows(q, columns),
        _empty_rows(k, columns),
    )


@torch.library.register_fake("fbila::focused_la_backward", lib=LIBRARY)
def _(do, q, k, v, columns, *options):
    return _empty_gradients(q, k, v, columns)


class FocusedLA(torch.autograd.Function):
    """`fbila::focused_la` and its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.options, ctx.places = arguments[7:], None
        if ordinary(*arguments[:7]):
            q, k, v = arguments[:3]
            # The sum that is the gradient of the shift reads dk, and faster where it is dense.
            ctx.places = places(q, None if ctx.needs_input_grad[6] else k, v)
            o, *kept = forward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, *kept = torch.ops.fbila.focused_la_forward(*arguments)
        ctx.save_for_backward(*arguments[:7], *kept)
        return o

    @staticmethod
    def backward(ctx, do):
        # Asked for once, as checkpoints of activations want it.
        inputs = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and ordinary(do, *inputs)
        if unseen and ctx.places:
            into = gradients_in(ctx.places, *inputs[:3])
            gradients = backward(do, *inputs, *ctx.options, into)
        else:
            run = backward if unseen else torch.ops.fbila.focused_la_backward
            gradients = run(do, *inputs, *ctx.options)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        dshift = None
        if ctx.needs_input_grad[6]:
            dk = gradients[1].transpose(1, 2)
            dshift = _over_items(dk) if unseen else dk.sum(0)
        return (*(x if needed else None for x, needed in wanted), None, None, dshift, None, None)


@replayed
def _over_items(dk):
    """The sum of dk `(B, M, H, K)` over B, which is the gradient of the shift."""
    if dk.numel() == 0 or not dk.is_contiguous():
        return dk.sum(0)
    return column_sums(dk.view(dk.shape[0], -1)).view(dk.shape[1:])


def focused_la(q, k, v, columns, key_mask, total, shift, *options):
    """`fbila::focused_la`, straight away where nothing stands in between."""
    inputs = (q, k, v, columns, key_mask, total, shift)
    if not ordinary(*inputs):
        return torch.ops.fbila.focused_la(*inputs, *options)
    run = FocusedLA.apply if needs_gradient(q, k, v, columns, shift) else inference
    return run(*inputs, *options)


differentiable_by("focused_la", FocusedLA.apply, inference)
refuse_second_derivative("focused_la_backward", "focused_la")

"""`simple_la` of values about their mean, and that mean, as a torch.library op.

    o_i = scale * phi(q_i) sum_j phi(k_j)^T (v_j - m)        m = mean_j v_j

`fbila::centred_la`: q `(B, H, N, K)`, k `(B, H, M, K)`, v `(B, H, M, V)` of the same dtype and H
-> o `(B, H, N, V)`, in the memory order of q, and m `(B, H, V)`, both in that dtype. Any strides
are read in place, and no values but v itself: the state is corrected (`kernels/centre.py`).
The feature map is any but "signed".

The op is for 16-bit values, of which differences to a mean would be rounded once more. Those of
wider ones are not worth a rounding: there they are computed, since sums of values with a large mean
would cost digits.
"""

import torch

from .autocast import cast_for_autocast, without_autocast
from .autograd import differentiable_by, needs_gradient, ordinary, refuse_second_derivative
from .checks import check_feature_dim, choose_implementation
from .functional import simple_la
from .inlining import inline
from .layout import empty_like_order
from .library import LIBRARY, empty_state, sum_dtype
from .places import gradients_in, places
from .reference import simple_la_reference
from .replay import replayed
from .tensor_checks import check_tensors

_INPUTS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "str feature_map, float scale"
LIBRARY.define(f"centred_la({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(f"centred_la_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"centred_la_backward(Tensor do, Tensor dmean, {_INPUTS}, Tensor state, Tensor centre, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def _empty_results(q, v):
    return empty_like_order(q, v.shape[-1]), v.new_empty(*v.shape[:2], v.shape[-1])


def _empty_kept(k, v, feature_map):
    """The state about the mean, and the mean in the type of sums."""
    state = empty_state(k, v, feature_map)
    return state, state.new_empty(state.shape[0], v.shape[-1])


@replayed
def inference(q, k, v, feature_map, scale):
    """o and the mean."""
    return _forward(q, k, v, False, feature_map, scale)[:2]


@replayed
def forward(q, k, v, feature_map, scale):
    """o and the mean, and for the backward pass the state and the mean in the type of sums."""
    return _forward(q, k, v, True, feature_map, scale)


def _forward(q, k, v, kept, feature_map, scale):
    from .kernels import short
    from .kernels.centre import launch_centred_state
    from .kernels.output import launch_output

    o, mean = _empty_results(q, v)
    state, centre = _empty_kept(k, v, feature_map)
    if k.numel() == 0 or v.numel() == 0:
        return o.zero_(), mean.zero_(), state.zero_(), centre.zero_()
    if short.serves(q, k, v, feature_map):
        of_sums = (state, centre) if kept else (None, None)
        short.launch_short(
            q, k, v, o, of_sums[0], None, feature_map, False, scale, 0.0,
            mean=mean, centre=of_sums[1],
        )  # fmt: skip
    else:
        launch_centred_state(k, v, state, mean, centre if kept else None, feature_map)
        if o.numel():
            launch_output(q, state, o, feature_map, False, scale, 0.0, mean=False)
    return o, mean, state, centre


def backward(do, dmean, q, k, v, *kept_and_options):
    """dq, dk and dv."""
    gradients = _empty_gradients(q, k, v)
    backward_into(do, dmean, q, k, v, *kept_and_options, *gradients)
    return gradients


@replayed
def backward_into(do, dmean, q, k, v, state, centre, feature_map, scale, dq, dk, dv):
    """`backward`, into dq, dk and dv."""
    from .kernels.centre import launch_centre_gradient
    from .kernels.grad_key import launch_grad_key
    from .kernels.grad_query import launch_grad_query
    from .kernels.side import PLAIN

    M = k.shape[2]
    if do.numel() == 0 or M == 0:
        dq.zero_()
        dk.zero_()
        # Values that no query reads have a mean none the less.
        dv.copy_(dmean.unsqueeze(2).expand_as(dv) / max(M, 1))
        return ()
    dstate = launch_grad_query(q, do, state, None, None, dq, PLAIN, k.shape[1], feature_map, scale)
    operand, share = launch_centre_gradient(dstate, state, centre, dmean.contiguous(), M, scale)
    launch_grad_key(k, v, operand, dk, dv, PLAIN, feature_map, True, 1.0, share=share)
    return ()


def _empty_gradients(*tensors):
    return tuple([empty_like_order(x, x.shape[-1]) for x in tensors])


for _name, _implementation in (
    ("centred_la", inference),
    ("centred_la_forward", forward),
    ("centred_la_backward", backward),
):
    for _key in ("CUDA", "CPU"):
        LIBRARY.impl(_name, _implementation, _key)
    inline(_name, _implementation)


@torch.library.register_fake("fbila::centred_la", lib=LIBRARY)
def _(q, k, v, feature_map, scale):
    return _empty_results(q, v)


@torch.library.register_fake("fbila::centred_la_forward", lib=LIBRARY)
def _(q, k, v, feature_map, scale):
    return *_empty_results(q, v), *_empty_kept(k, v, feature_map)


@torch.library.register_fake("fbila::centred_la_backward", lib=LIBRARY)
def _(do, dmean, q, k, v, *options):
    return _empty_gradients(q, k, v)


class CentredLA(torch.autograd.Function):
    """`fbila::centred_la` and its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, *options):
        ctx.options, ctx.places = options, None
        if ordinary(q, k, v):
            ctx.places = places(q, k, v)
            o, mean, *kept = forward(q, k, v, *options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, mean, *kept = torch.ops.fbila.centred_la_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, *kept)
        return o, mean

    @staticmethod
    def backward(ctx, do, dmean):
        # Asked for once, as checkpoints of activations want it.
        inputs = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and ordinary(do, dmean, *inputs)
        arguments = (do, dmean, *inputs, *ctx.options)
        if unseen and ctx.places:
            gradients = gradients_in(ctx.places, *inputs[:3])
            backward_into(*arguments, *gradients)
        else:
            run = backward if unseen else torch.ops.fbila.centred_la_backward
            gradients = run(*arguments)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(x if needed else None for x, needed in wanted), None, None)


differentiable_by("centred_la", CentredLA.apply, inference)
refuse_second_derivative("centred_la_backward", "centred_la", "Use PyTorch's own for that.")


def in_pytorch(q, k, v, feature_map, scale):
    """In float32 at least until the end, and the values about their mean."""
    with without_autocast(v):
        wide = v.to(sum_dtype(v))
        mean = wide.mean(2, keepdim=True)
        o = simple_la_reference(q, k, wide - mean, feature_map, scale)
        return o, mean.squeeze(2).to(v.dtype)


def centred_la(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fbila::centred_la` of 16 bits on a GPU, straight away where nothing stands in between.

    Under autocast q, k and v are cast to its dtype.
    """
    q, k, v = cast_for_autocast(q, k, v)
    if choose_implementation(None, q.device, q.dtype) == "reference":
        return in_pytorch(q, k, v, feature_map, scale)
    if v.dtype.itemsize > 2:
        mean = v.mean(2, keepdim=True)
        o = simple_la(q, k, v - mean, feature_map=feature_map, scale=scale)
        return o, mean.squeeze(2)
    check_tensors(q, k, v)
    check_feature_dim(q.shape[-1], feature_map or "none")
    options = feature_map or "none", scale
    if not ordinary(q, k, v):
        return torch.ops.fbila.centred_la(q, k, v, *options)
    run = CentredLA.apply if needs_gradient(q, k, v) else inference
    return run(q, k, v, *options)

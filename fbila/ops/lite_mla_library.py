"""EfficientViT's multi-scale linear attention as a torch.library op.

`fbila::lite_mla`: a picture x `(B, I, H, W)` and a list of weights

    t_0 = W_qkv x          t_s = W_s dwc_s(t_0)          y = W_proj [attend(t_0), attend(t_s), ...]
    attend(t)_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) + eps)

The list has, each with its bias or None behind it, W_qkv `(3 heads dim, I, 1, 1)`, for each further
scale the depthwise kernels `(3 heads dim, 1, k, k)` with k = 3 or 5 and W_s `(3 heads dim, dim, 1,
1)`, which multiplies each q, k and v of a head alone, and W_proj `(O, scales heads dim, 1, 1)`. x
may be NCHW or channels_last; y `(B, O, H, W)` and the gradient of x lie as x does.

It is differentiable by x and all weights. Kept for that are x, t, what depthwise convolutions make,
and what attention makes.
"""

import torch

from .autocast import without_autocast
from .autograd import differentiable_by, direct, needs_gradient
from .layout import empty_like_order
from .library import LIBRARY, empty_inverse, empty_state
from .lite_mla_passes import (
    backward,
    empty_gradients,
    empty_kept,
    empty_picture,
    forward,
    heads_of,
    inference,
)

_INPUTS = "Tensor x, Tensor?[] weights, int dim"
LIBRARY.define(f"lite_mla({_INPUTS}, float eps) -> Tensor")
LIBRARY.define(
    f"lite_mla_forward({_INPUTS}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "lite_mla_backward(Tensor dy, Tensor x, Tensor?[] weights, Tensor t, Tensor z, Tensor o, "
    "Tensor state, Tensor inverse, int dim, bool[] needs_grad) -> Tensor[]"
)


class LiteMLA(torch.autograd.Function):
    """`fbila::lite_mla` and its gradient."""

    @staticmethod
    def forward(ctx, x, dim, eps, *weights):
        if direct(x, *weights):
            y, *kept = forward(x, weights, dim, eps)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, *kept = torch.ops.fbila.lite_mla_forward(x, list(weights), dim, eps)
        ctx.save_for_backward(x, *kept, *weights)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx, dy):
        x, t, z, o, state, inverse, *weights = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, x, *weights)
        run = backward if unseen else torch.ops.fbila.lite_mla_backward
        # As convolutions do, in the dtypes of the forward pass.
        with without_autocast(dy):
            found = run(dy, x, weights, t, z, o, state, inverse, ctx.dim, needed)
        dx, *dweights = (
            gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)
        )
        return dx, None, None, *dweights


class Refusal(torch.autograd.Function):
    """The backward pass, which says that it has no gradient."""

    @staticmethod
    def forward(ctx, dy, x, rest, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.fbila.lite_mla_backward(dy, x, list(weights), *rest))

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "lite_mla cannot be differentiated twice by its kernels. Use PyTorch's own for that."
        )


def differentiable(x, weights, dim, eps):
    if needs_gradient(x, *weights) or torch.autograd.forward_ad._current_level >= 0:
        return LiteMLA.apply(x, dim, eps, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fbila.lite_mla(x, weights, dim, eps)


for _key in ("CUDA", "CPU"):
    LIBRARY.impl("lite_mla", inference, _key)
    LIBRARY.impl("lite_mla_forward", forward, _key)
    LIBRARY.impl("lite_mla_backward", backward, _key)
differentiable_by("lite_mla", differentiable, inference)
LIBRARY.impl(
    "lite_mla_backward",
    lambda dy, x, weights, *rest: list(Refusal.apply(dy, x, rest, *weights)),
    "Autograd",
)


@torch.library.register_fake("fbila::lite_mla", lib=LIBRARY)
def _(x, weights, dim, eps):
    return empty_picture(x, weights[-2].shape[0])


@torch.library.register_fake("fbila::lite_mla_forward", lib=LIBRARY)
def _(x, weights, dim, eps):
    t, z = empty_kept(x, weights, dim)
    q, k, v = heads_of(t, dim)
    state, inverse = empty_state(k, v, "relu"), empty_inverse(q, "sum")
    return empty_picture(x, weights[-2].shape[0]), t, z, empty_like_order(q, dim), state, inverse


@torch.library.register_fake("fbila::lite_mla_backward", lib=LIBRARY)
def _(dy, x, weights, t, z, o, state, inverse, dim, needs_grad):
    return empty_gradients(x, weights, needs_grad)


def lite_mla(
    x: torch.Tensor, weights: list[torch.Tensor | None], dim: int, eps: float
) -> torch.Tensor:
    """`fbila::lite_mla` on a GPU, straight away where nothing stands in between."""
    if not direct(x, *weights):
        return torch.ops.fbila.lite_mla(x, weights, dim, eps)
    if needs_gradient(x, *weights):
        return LiteMLA.apply(x, dim, eps, *weights)
    return inference(x, weights, dim, eps)

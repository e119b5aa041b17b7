"""Differentiation: which passes make up forward and backward, and what is kept between them.

Kept are q, k, v (the inputs themselves), the state, `K * V + K` numbers a head, and one number a
token and head, the inverse of its denominator: nothing of the size of q.
"""

import torch

from .library import LIBRARY


class LinearAttn(torch.autograd.Function):
    """`fbila::linear_attn` and its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, feature_map, normalizer, scale, eps):
        ctx.options = (feature_map, normalizer, scale, eps)
        with torch._C._AutoDispatchBelowAutograd():
            o, state, inverse = torch.ops.fbila.linear_attn_forward(q, k, v, *ctx.options)
        ctx.save_for_backward(q, k, v, state, inverse)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, state, inverse = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = torch.ops.fbila.linear_attn_backward(
            do, q, k, v, state, inverse, *ctx.options, [need_q, need_k or need_v]
        )
        return (
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            None, None, None, None,
        )  # fmt: skip


class LinearAttnBackward(torch.autograd.Function):
    """`fbila::linear_attn_backward`, whose own gradient is refused rather than silently zero."""

    @staticmethod
    def forward(ctx, do, q, k, v, state, inverse, *options):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.linear_attn_backward(do, q, k, v, state, inverse, *options)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "linear_attn and simple_la cannot be differentiated twice by their kernels. Pass "
            "impl='reference' for gradients of gradients."
        )


def linear_attn(q, k, v, feature_map, normalizer, scale, eps):
    return LinearAttn.apply(q, k, v, feature_map, normalizer, scale, eps)


def linear_attn_backward(do, q, k, v, state, inverse, *options):
    return LinearAttnBackward.apply(do, q, k, v, state, inverse, *options)


LIBRARY.impl("linear_attn", linear_attn, "Autograd")
LIBRARY.impl("linear_attn_backward", linear_attn_backward, "Autograd")

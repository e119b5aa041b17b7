"""Differentiation: which passes make up forward and backward, and what is kept between them.

Kept are q, k, v (the inputs themselves) and the state, `K * V + K` numbers a head: nothing that
grows with the number of tokens.
"""

import torch
from torch.autograd.function import once_differentiable

from .library import LIBRARY


class LinearAttn(torch.autograd.Function):
    """`fbila::linear_attn` with its gradient; gradients of gradients are refused."""

    @staticmethod
    def forward(ctx, q, k, v, feature_map, normalizer, scale, eps):
        ctx.options = (feature_map, normalizer, scale, eps)
        with torch._C._AutoDispatchBelowAutograd():
            o, state = torch.ops.fbila.linear_attn_forward(q, k, v, *ctx.options)
        ctx.save_for_backward(q, k, v, state)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, state = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = torch.ops.fbila.linear_attn_backward(
            do, q, k, v, state, *ctx.options, [need_q, need_k or need_v]
        )
        return (
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            None, None, None, None,
        )  # fmt: skip


def linear_attn_autograd(q, k, v, feature_map, normalizer, scale, eps):
    return LinearAttn.apply(q, k, v, feature_map, normalizer, scale, eps)


LIBRARY.impl("linear_attn", linear_attn_autograd, "Autograd")

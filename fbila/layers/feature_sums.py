"""Sums over features that are never written to memory: over tokens, and in a dot product.

    feature_sum(x) = sum_i phi(x_i)          feature_dot(x, w)_i = phi(x_i) . w

Both are what the halves of linear attention compute, with nothing in the place of values in the
first and of the denominator in the second. Where these are kernels, the state is what they write
and read: to take it apart and put it together again would take as many launches as there are here.
"""

import torch
from torch import Tensor

from ..ops import State, halves_library, linear_attn_apply, linear_attn_state
from ..ops.autocast import cast_for_autocast
from ..ops.checks import choose_implementation


def feature_sum(x: Tensor, feature_map: str) -> Tensor:
    """`(B, H, K)`, in float32 at least, of x `(B, H, N, K)`; features are as many as channels."""
    if choose_implementation(None, x.device, x.dtype) == "reference":
        return linear_attn_state(x, x[..., :0], feature_map=feature_map).key_sum
    (x,) = cast_for_autocast(x)
    options = None, None, None, feature_map, "none"
    # Of a slice of x itself the gradient would be one of zeros, to be added.
    nothing = x.detach()[..., :0]
    rows = halves_library.linear_attn_state(x, nothing, *options)
    return rows.view(x.shape[0], x.shape[1], x.shape[3])


def feature_dot(x: Tensor, weight: Tensor, feature_map: str) -> Tensor:
    """`(B, H, N)`, in the dtype of x `(B, H, N, K)`, or that of autocast; weight `(B, H, K)`."""
    weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    # The denominator is 0 + eps = 1.
    options = feature_map, "sum"
    nothing = torch.zeros_like(weight)
    if choose_implementation(None, x.device, x.dtype) == "reference":
        state = State(weight.unsqueeze(-1), nothing, weight.new_ones(weight.shape[:1]))
        dots = linear_attn_apply(x, state, feature_map=feature_map, eps=1.0, normalizer="sum")
        return dots.squeeze(-1)
    (x,) = cast_for_autocast(x)
    rows = torch.cat((weight, nothing), -1).flatten(0, 1)
    dots = halves_library.linear_attn_apply(x, rows, None, None, *options, "none", 1.0)
    return dots.squeeze(-1)

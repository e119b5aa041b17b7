"""Sums over features that are never written to memory: their mean over tokens, and a dot product.

    feature_mean(x) = mean_i phi(x_i)          feature_dot(x, w)_i = phi(x_i) . w

Both are what the halves of linear attention compute, with nothing in the place of values in the
first and of the denominator in the second.
"""

import torch
from torch import Tensor

from ..ops import State, linear_attn_apply, linear_attn_state


def feature_mean(x: Tensor, feature_map: str) -> Tensor:
    """`(B, H, K)`, in float32 at least, of x `(B, H, N, K)`."""
    return linear_attn_state(x, x[..., :0], feature_map=feature_map).key_sum / x.shape[2]


def feature_dot(x: Tensor, weight: Tensor, feature_map: str) -> Tensor:
    """`(B, H, N)`, in the dtype of x `(B, H, N, K)`, or that of autocast; weight `(B, H, K)`."""
    weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    # The denominator is 0 + eps = 1.
    state = State(weight.unsqueeze(-1), torch.zeros_like(weight), weight.new_ones(weight.shape[:1]))
    dots = linear_attn_apply(x, state, feature_map=feature_map, eps=1.0, normalizer="sum")
    return dots.squeeze(-1)

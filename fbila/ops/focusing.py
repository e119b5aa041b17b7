"""Focused linear attention in eager PyTorch: a feature map over all heads of a token.

    x^ = (relu(x) + 1e-6) / softplus(scale)          f(x) = ||x^|| x^p / ||x^p||

f keeps the length of x^ and turns it towards its largest channels, the more so the larger p is.
"""

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .feature_maps import relu_offset
from .layout import in_order_of
from .reference import linear_attn_reference


def focused_la_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    focusing_factor: float,
    scale: torch.Tensor | None,
    eps: float,
    key_mask: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_attn` of f(q) and f(k), normalised by the mean."""
    if key_positions is not None:
        k = k + key_positions.to(k.dtype)
    if key_mask is not None:
        # Before f, whose gradient at NaN is NaN.
        k = k.masked_fill(~key_mask[:, None, :, None], 0)
    f_q, f_k = (focus(x, focusing_factor, scale) for x in (q, k))
    o = linear_attn_reference(f_q, f_k, v, None, "mean", eps, key_mask=key_mask)
    return in_order_of(q, o.to(q.dtype))


def focus(x: torch.Tensor, focusing_factor: float, scale: torch.Tensor | None) -> torch.Tensor:
    """f of `x` `(B, H, N, K)`, in float32 at least; `scale` `(H, K)` is as it is learned."""
    with without_autocast(x):
        x = relu_offset(x.to(torch.promote_types(x.dtype, torch.float32)))
        if scale is not None:
            x = x / F.softplus(scale.to(x.dtype)).unsqueeze(-2)
        if x.numel() == 0:
            return x
        # x^p / ||x^p|| does not know the length of x: with its largest channel 1, no power
        # overflows and the norm does not vanish.
        powers = (x / x.detach().amax((1, 3), keepdim=True)) ** focusing_factor
        return powers * (_norm(x) / _norm(powers))


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Over all heads and channels of a token."""
    return torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True)

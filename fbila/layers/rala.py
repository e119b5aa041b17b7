"""Rank-augmented linear attention (RALA), the token mixer of RAVLT.

    q, k, v, g = split(W_qkvo x)          phi = elu + 1
    w_j = N softmax_j(d^(-1/2) mean_i phi(q_i) . phi(k_j))
    o_i = R_i phi(q_i) mean_j(w_j (R_j phi(k_j))^T v_j) / (phi(q_i) . mean_j w_j phi(k_j) + 1e-6)
    y = W_proj ((o + dwc(v)) * g)

x, y: `(B, C, H, W)` of N positions. Keys are weighed by what the mean query asks for, so that the
state is of higher rank.
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025,
https://arxiv.org/abs/2411.07635; qhfan/RALA.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import linear_attn
from .feature_sums import feature_dot, feature_sum
from .gated_picture import GatedPictureAttention


class RALA(GatedPictureAttention):
    """The linear attention layer of RAVLT, `(B, C, H, W)` to the same shape, of any H and W.

    Parameters bear the official names, `qkvo`, `lepe` and `proj`. The official stages have the
    frequencies of their rotary embedding in a buffer, `RoPE.angle`, which is no part of this layer
    in them either; here they are computed.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim` into multiples of 4.

    Raises:
        ValueError: If it does not.

    Example:
        >>> import torch
        >>> layer = RALA(64, num_heads=2)
        >>> layer(torch.randn(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """`linear_attn` of weighed keys; the weights come from two operations before it."""
        wish = feature_sum(q, "elu1") * (self.scale / max(q.shape[2], 1))
        logits = feature_dot(k, wish, "elu1")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        options: Any = {"feature_map": "elu1", "eps": 1e-6, "rotary": rotary}
        # Sums of softmax's weights are means of w, which are N times these.
        weight = logits.softmax(-1, dtype=dtype)
        return linear_attn(q, k, v, key_weight=weight, normalizer="sum", **options)

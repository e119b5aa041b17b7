"""Magnitude-aware linear attention (MALA).

    q, k, v, g = split(W_qkvo x)          phi = elu + 1
    z_i = d^(-1/2) phi(q_i) . mean_j phi(k_j)
    n_i = d^(-1/2) R_i phi(q_i) mean_j((R_j phi(k_j))^T v_j)
    o_i = (1 + 1 / (z_i + 1e-6)) n_i - z_i mean_j v_j
    y = W_proj ((o + dwc(v)) * g)

x, y: `(B, C, H, W)`. Without R the weights of the values add up to 1, as with a denominator, but a
longer query makes them sharper, as in softmax.
Fan et al., "Rectifying Magnitude Neglect in Linear Attention", ICCV 2025,
https://arxiv.org/abs/2507.00698; qhfan/MALA.
"""

from typing import Any

from torch import Tensor

from ..ops import linear_attn_apply, linear_attn_state
from ..ops.magnitude import with_magnitude
from .feature_sums import feature_dot
from .gated_picture import GatedPictureAttention

EPS = 1e-6


class MALA(GatedPictureAttention):
    """The linear attention layer of MAViT, `(B, C, H, W)` to the same shape, of any H and W.

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
        >>> layer = MALA(64, num_heads=2)
        >>> layer(torch.randn(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """One pass over keys, two over queries; the rest is a few numbers a token.

        a_i = n_i / (z_i + eps) is linear attention, and (1 + 1 / (z_i + eps)) n_i is
        (1 + eps + z_i) a_i, in which nothing is larger than z_i times a mean of values.
        """
        state = linear_attn_state(k, v, feature_map="elu1", rotary=rotary)
        # Without d^(-1/2) in numerator and denominator eps is so much larger.
        a = linear_attn_apply(q, state, feature_map="elu1", eps=EPS / self.scale, rotary=rotary)
        key_mean = state.key_sum / k.shape[2]
        z = feature_dot(q, self.scale * key_mean, "elu1").unsqueeze(-1)
        return with_magnitude(a, z, v, EPS)

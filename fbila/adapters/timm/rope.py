"""timm's rotary position embedding in linear attention: after the feature map, in the numerator.

    o_i = R_i phi(q_i) sum_j (R_j phi(k_j))^T v_j / (phi(q_i) . sum_j phi(k_j))

R is the rotation that timm gives q and k before softmax; there it turns logits into functions of
the distance of two tokens, and here their weights. The denominator has none: it could vanish.
Source: Su et al., "RoFormer", 2021, section 3.3; so do MLLA, RALA and SANA-Video.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import Rotary, linear_attn, simple_la
from ...ops.derived import derived
from ...ops.feature_maps import FEATURE_MAPS
from ...ops.rotary import rotate

EPS = 1e-6


def as_rotary(rope: Tensor | None, prefix: int, half: bool) -> Rotary | None:
    """Tables of `prefix` tokens that are not turned, and then of those of `rope`.

    Args:
        rope: `(..., N - prefix, 2 K)`, the sines of all channels and then their cosines.
        prefix: Class and register tokens, which have no position.
        half: The channels of a pair are K / 2 apart, not neighbours.

    Returns:
        cos and sin `(..., N, K / 2)`.
    """
    if rope is None:
        return None
    # Layers are given the same one, and forward passes too where it is a buffer.
    return derived(lambda: _tables(rope, prefix, half), (prefix, half), rope)


def _tables(rope: Tensor, prefix: int, half: bool) -> Rotary:
    sin, cos = rope.chunk(2, -1)
    # Both channels of a pair have the same angle.
    one = slice(cos.shape[-1] // 2) if half else slice(0, None, 2)
    cos = F.pad(cos[..., one], (0, 0, prefix, 0), value=1.0)
    return Rotary(cos, F.pad(sin[..., one], (0, 0, prefix, 0)), interleaved=not half)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    rotary: Any,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
) -> Tensor:
    """`fbila.linear_attn` with tables of any kind.

    Args:
        q, k, v: `(B, H, N, K)`; k and v may have fewer heads.
        rotary: None, or a `Rotary` with tables `(N, K / 2)` or `(H, N, K / 2)`, learned or not;
            or `(B, 1 or H, N, K / 2)`, of pictures of different sizes.
        key_mask, key_weight: `(B, N)`.

    Returns:
        `(B, H, N, K)`.
    """
    if rotary is not None and (rotary.cos.dim() == 4 or rotary.cos.requires_grad):
        return _rotate_outside(q, k, v, feature_map, rotary, key_mask, key_weight)
    return linear_attn(
        q,
        k,
        v,
        feature_map=feature_map,
        eps=EPS,
        rotary=rotary,
        key_mask=key_mask,
        key_weight=key_weight,
    )


def _rotate_outside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    rotary: Rotary,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
) -> Tensor:
    """The same, rotated in PyTorch: kernels read tables of one picture, without gradient."""
    M = k.shape[2]
    wide = torch.promote_types(v.dtype, torch.float32)
    phi_q, phi_k = (FEATURE_MAPS[feature_map](x.to(wide)) for x in (q, k))
    weighed = phi_k if key_weight is None else phi_k * key_weight[:, None, :, None]
    count = phi_k.new_full((1, 1, 1, 1), M)
    if key_mask is not None:
        there = key_mask[:, None, :, None]
        # Selected, not multiplied: what is not there may be NaN.
        weighed = torch.where(there, weighed, 0)
        count = there.sum(2, keepdim=True, dtype=wide).clamp(min=1)
    key_mean = weighed.sum(2, keepdim=True) / count
    key_mean = key_mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    denominator = (phi_q * key_mean).sum(-1, keepdim=True) + EPS
    numerator = simple_la(
        rotate(phi_q, rotary).to(v.dtype),
        rotate(phi_k, rotary).to(v.dtype),
        v,
        scale=1 / M,
        key_mask=key_mask,
        key_weight=key_weight,
    )
    return (numerator * (M / count) / denominator).to(v.dtype)

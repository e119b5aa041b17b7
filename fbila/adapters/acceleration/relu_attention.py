"""Linear attention with ReLU, as Sana, DC-AE and EfficientViT have it, for their fast forwards.

    o_i = relu(q_i) (sum_j relu(k_j)^T v_j) / (relu(q_i) . sum_j relu(k_j) + eps)

Their own code makes float32 copies of q, k and v, and appends a channel of ones to v, whose output
is the denominator. Here they are read as they are, in half precision too, and summed in float32.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from ...ops import linear_attn
from ...ops.layout import is_channels_first


def relu_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float, rotary: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of `(B, H, N, D)` with `eps` beside the sum; as q in memory.

    Args:
        rotary: cos and sin `(N, D / 2)` that turn neighbouring channels of relu(q) and relu(k), in
            the numerator alone.
    """
    # Where norms of q and k keep float32 weights in a model of half precision, v alone is half.
    if not q.dtype == k.dtype == v.dtype:
        dtype = reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
        q, k, v = (x.to(dtype) for x in (q, k, v))
    return linear_attn(q, k, v, feature_map="relu", normalizer="sum", eps=eps, rotary=rotary)


def attend_picture(qkv: Tensor, head_dim: int, eps: float) -> Tensor:
    """`relu_attention` `(B, H, N, D)` of a picture `(B, H * 3 * D, height, width)`, read in place.

    The channels of a head are its query, key and value in turn.
    """
    heads = qkv.flatten(2).unflatten(1, (-1, 3 * head_dim)).transpose(2, 3)
    q, k, v = heads.chunk(3, dim=3)
    return relu_attention(q, k, v, eps)


def attend_contiguous(qkv: Tensor, head_dim: int, eps: float) -> Tensor:
    """`attend_picture` as a picture `(B, H * D, height, width)`, of a contiguous one.

    Without a gradient: the views that it makes would have a slow one.
    """
    B, C, height, width = qkv.shape
    N = height * width
    shape, stride = (B, C // (3 * head_dim), N, head_dim), (C * N, 3 * head_dim * N, 1, N)
    start = qkv.storage_offset()
    q, k, v = [qkv.as_strided(shape, stride, start + i * head_dim * N) for i in range(3)]
    return relu_attention(q, k, v, eps).transpose(2, 3).reshape(B, C // 3, height, width)


def join_heads(outputs: list[Tensor], size: tuple[int, int]) -> Tensor:
    """A picture `(B, H * D, height, width)` of the heads of all `outputs` `(B, H, N, D)`.

    NCHW where all of them are channels-first, else channels_last. The heads of a single one are
    not copied.
    """
    if all(is_channels_first(o) for o in outputs):
        return (
            _concatenate([o.transpose(2, 3) for o in outputs], 1).flatten(1, 2).unflatten(2, size)
        )
    tokens = _concatenate([o.transpose(1, 2) for o in outputs], 2)
    return tokens.flatten(2).unflatten(1, size).permute(0, 3, 1, 2)


def _concatenate(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def why_not_relu(nonlinearity: nn.Module) -> str:
    """Why a module with this feature map stays; `""` if it is ReLU."""
    kind = type(nonlinearity)
    return "" if kind is nn.ReLU else f"has the feature map {kind.__name__}, not ReLU"

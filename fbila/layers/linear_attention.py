"""The plain layer: multi-head self-attention whose softmax became a feature map.

q, k, v = split(W_qkv x)        o_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) . sum_j phi(k_j))
y = W_proj o                    x, y: `(B, N, C)`, with C = num_heads * head_dim
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from ..ops import linear_attn
from ..ops.parts import parts
from .checks import check_attn_drop, check_heads
from .grid import heads_of


class LinearAttention(nn.Module):
    """Bidirectional linear attention, `(B, N, C)` to `(B, N, C)`, in time and memory linear in N.

    Parameter names and the constructor follow timm's `Attention`, whose weights therefore load with
    `strict=True`. The function is another one: weights trained for softmax are a place to start
    training from, not a result.

    Args:
        dim: Channels C of input and output.
        num_heads: Heads H; must divide `dim`.
        qkv_bias: Adds a bias to the query, key and value projection.
        qk_norm: Normalises queries and keys per head with `norm_layer`, before the feature map.
        proj_bias: Adds a bias to the output projection.
        attn_drop: Accepted for call sites written for softmax attention; must be 0, since there is
            no attention map to drop entries of.
        proj_drop: Dropout probability after the output projection.
        norm_layer: Class of the norms of `qk_norm`, called with the head dim.
        feature_map: Name of phi, as in `fbila.linear_attn`.
        eps: Added to the denominator, in the convention of `normalizer`.
        normalizer: `"mean"` or `"sum"`: whether `eps` meets phi(q) . mean(phi(k)) or the sum.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or `attn_drop` is not 0.

    Example:
        >>> import torch
        >>> layer = LinearAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        *,
        feature_map: str | None = "elu1",
        eps: float = 1e-6,
        normalizer: Literal["mean", "sum"] = "mean",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_attn_drop(attn_drop)
        self.num_heads = num_heads
        self.feature_map = feature_map
        self.eps = eps
        self.normalizer = normalizer
        factory = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the tokens of `x` `(B, N, C)`."""
        # (B, N, 3 * C) -> three (B, H, N, D) views of one tensor, which the op reads in place.
        q, k, v = (heads_of(t, self.num_heads) for t in parts(self.qkv(x), 3))
        out = linear_attn(
            self.q_norm(q),
            self.k_norm(k),
            v,
            feature_map=self.feature_map,
            eps=self.eps,
            normalizer=self.normalizer,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, feature_map={self.feature_map!r}, eps={self.eps}, "
            f"normalizer={self.normalizer!r}"
        )

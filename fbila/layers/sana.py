"""SANA's linear attention: ReLU features, normalised by their sum, without position encoding.

    q, k, v = split(W_qkv x)          q, k <- RMSNorm(q), RMSNorm(k) over all heads, if asked for
    o_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) + 1e-15)
    y   = W_proj o + b_proj

x, y: `(B, N, C)`. Positions come in by the convolutions of SANA's feed-forward layers.
Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
ICLR 2025, https://arxiv.org/abs/2410.10629; NVlabs/Sana.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import linear_attn
from ..ops.parts import parts
from .checks import check_heads
from .grid import heads_of
from .linear import Linear


class SanaLinearAttention(nn.Module):
    """The self-attention of SANA, `(B, N, C)` to `(B, N, C)`.

    Parameters bear the official names, `qkv`, `proj` and, with `qk_norm`, `q_norm` and `k_norm`.
    Those of diffusers are `to_q`, `to_k` and `to_v`, which make `qkv` one below the other,
    `to_out.0`, `norm_q` and `norm_k`.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`. None: as many as have 32 channels each, as in SANA.
        qkv_bias: Adds a bias to the query, key and value projection.
        qk_norm: Normalises queries and keys by an RMSNorm over all heads.
        eps: Added to the denominator. The official blocks pass 1e-8; diffusers has 1e-15.
        norm_eps: Of the RMSNorms.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.

    Example:
        >>> import torch
        >>> layer = SanaLinearAttention(64)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        *,
        eps: float = 1e-15,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        num_heads = dim // 32 if num_heads is None else num_heads
        check_heads(dim, num_heads)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.eps = eps
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = RMSNorm(dim, norm_eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, norm_eps, **factory) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the tokens of `x` `(B, N, C)`; float16 is clipped to what is finite in it."""
        q, k, v = parts(self.qkv(x), 3)
        q, k = self.q_norm(q), self.k_norm(k)
        # Views, which the op reads in place.
        q, k, v = (heads_of(t, self.num_heads) for t in (q, k, v))
        out = linear_attn(q, k, v, feature_map="relu", normalizer="sum", eps=self.eps)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, eps={self.eps}"


class RMSNorm(nn.RMSNorm):
    """In the dtype of its weight, so that autocast does not make two dtypes of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

"""LinFusion's token mixer: linear attention with non-linear query and key projections.

    F(x) = W_2 LeakyReLU(LayerNorm(W_1 x + b_1)) + b_2        one for queries, one for keys
    q = elu(W_q (x + F_q(x))) + 1      k = elu(W_k (x + F_k(x))) + 1      v = W_v x
    o_i = q_i mean_j(k_j^T v_j) / (q_i . mean_j(k_j) + 1e-4)              y = W_o o + b_o

x, y: `(B, N, C)`. Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", https://arxiv.org/abs/2409.02097.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import linear_attn, linear_attn_apply, linear_attn_state
from ..ops.autocast import cast_for_autocast
from . import linfusion_gradient
from .fused_linfusion import FusedProjections
from .nonlinear_projection import NonlinearProjection

EPS = 1e-4


def attend_in_chunks(
    layer: Any, norm: nn.Module, x: Tensor, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The layer's answer to norm(x), piece by piece, in the memory of one piece.

    The keys are gone over first, and their states added. A piece may be written over once it has
    been yielded.

    Args:
        layer: A `GeneralizedLinearAttention`.
        norm: Applied to pieces of x.
        x: `(B, N, C)`.
        tokens: Length of a piece.

    Yields:
        (piece of x, a view; the answer for its tokens).
    """
    state = None
    for piece in x.split(tokens, 1):
        normed = norm(piece)
        key, value = layer.to_k(normed + layer.to_k_(normed)), layer.to_v(normed)
        part = linear_attn_state(layer.heads_of(key), layer.heads_of(value), feature_map="elu1")
        state = part if state is None else state + part
    assert state is not None
    for piece in x.split(tokens, 1):
        normed = norm(piece)
        query = layer.heads_of(layer.to_q(normed + layer.to_q_(normed)))
        out = linear_attn_apply(query, state, feature_map="elu1", eps=EPS, normalizer="mean")
        yield piece, layer.to_out[0](out.transpose(1, 2).flatten(2))


def nonlinear_projection(
    dim: int, mid_dim: int | None = None, *, device: Any = None, dtype: Any = None
) -> nn.Module:
    """F, `(..., dim)` to `(..., dim)`, with parameters under the names `0`, `1` and `3`.

    Args:
        dim: Channels.
        mid_dim: Width between the two linear maps. None means `dim`; -1 means that F is the
            identity, so that a projection sees x + x, which is how the published code reads -1.
    """
    if mid_dim == -1:
        return nn.Identity()
    return NonlinearProjection(dim, dim if mid_dim is None else mid_dim, device=device, dtype=dtype)


class GeneralizedLinearAttention(nn.Module):
    """The attention layer of LinFusion, `(B, N, C)` to `(B, N, C)`.

    Parameters bear the names of the published checkpoints: `to_q`, `to_k`, `to_v`, `to_out.0`, and
    F_q and F_k as `to_q_` and `to_k_`.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`.
        projection_mid_dim: Width inside F, see `nonlinear_projection`.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.

    Example:
        >>> import torch
        >>> layer = GeneralizedLinearAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        projection_mid_dim: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")
        factory = {"device": device, "dtype": dtype}
        self.heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False, **factory)
        self.to_k = nn.Linear(dim, dim, bias=False, **factory)
        self.to_v = nn.Linear(dim, dim, bias=False, **factory)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, **factory), nn.Dropout(0.0)])
        self.to_q_ = nonlinear_projection(dim, projection_mid_dim, **factory)
        self.to_k_ = nonlinear_projection(dim, projection_mid_dim, **factory)
        self.fused: FusedProjections | None = None

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Mixes the tokens of `x` `(B, N, C)`; `key_mask` `(B, N)` is False for keys to hide."""
        # Once, rather than in each of the three layers that read it, which would keep a copy each.
        (x,) = cast_for_autocast(x)
        fused = self.fused
        if fused is None and key_mask is None and linfusion_gradient.serves(self, x):
            return linfusion_gradient.attend(self, x, EPS)
        # (B, H, N, D) views, which the op reads in place.
        if fused is not None:
            q, k, v = fused.forward(x)
        else:
            q = self.heads_of(self.to_q(x + self.to_q_(x)))
            k = self.heads_of(self.to_k(x + self.to_k_(x)))
            v = self.heads_of(self.to_v(x))
        out = linear_attn(
            q, k, v, feature_map="elu1", eps=EPS, normalizer="mean", key_mask=key_mask
        )
        project, dropout = self.to_out
        out = project(out.transpose(1, 2).reshape(x.shape))
        return dropout(out) if self.training else out

    def heads_of(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D), a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def fuse(self) -> None:
        """Computes queries, keys and values by fewer products, exactly but for rounding.

        For inference: the weights must stay as they are until `unfuse`, and have no gradients.
        """
        if self.fused is None:
            self.fused = FusedProjections(self)

    def unfuse(self) -> None:
        """Undoes `fuse`; the weights are the very same."""
        self.fused = None

    @torch.no_grad()
    def start_from(self, softmax_attention: Any) -> None:
        """Takes over the projections of a softmax attention layer, with F starting as nothing.

        The last linear map of F becomes zero, so that the layer begins as linear attention over
        the very queries, keys and values that the softmax layer was trained with.

        Args:
            softmax_attention: A layer with `to_q`, `to_k`, `to_v` `(C, C)` and `to_out[0]`.
        """
        self.to_v.weight.copy_(softmax_attention.to_v.weight)
        self.to_out[0].load_state_dict(softmax_attention.to_out[0].state_dict())
        for name, nonlinear in (("to_q", self.to_q_), ("to_k", self.to_k_)):
            weight = getattr(self, name).weight
            weight.copy_(getattr(softmax_attention, name).weight)
            if isinstance(nonlinear, nn.Sequential):
                for parameter in nonlinear[3].parameters():
                    parameter.zero_()
            else:
                weight.mul_(0.5)  # with the identity the projection is given x + x

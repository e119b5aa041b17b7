"""PolaFormer++'s token mixer: signs kept apart as in PolaFormer, and exponential features.

    phi(x; s) = exp(s * [relu(x), relu(-x)]) - 1        s_1, s_2: of each feature, in (0, 1)
    o = [LA(phi(q; s_1), phi(k; 1), v_1), LA(phi(-q; s_2), phi(k; 1), v_2)]        v = [v_1, v_2]
    y = W_proj ((o + dwc(v)) * g)

x, y: `(B, N, C)`; LA is `linear_attn` with eps = 1e-6 and, in its numerator, a rotary embedding of
the 2 d features of a head: the first half of them, the positive parts, turns by the row of the
token and the second by its column. The gate g is a linear map of x without activation, dwc a
depthwise 5 x 5 convolution over the grid (LePE).
Meng et al., "PolaFormer++: Polarity-aware Linear Attention with Channel-wise Spikiness", as in the
code of ZacharyMeng/PolaFormerPP.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Rotary, linear_attn
from ..ops.parts import parts
from ..ops.signed_map_library import signed_map
from .axial_rotary import AxialRotary
from .checks import check_even_head_dim
from .depthwise_conv import DepthwiseConv2d
from .grid import as_grid, as_tokens, grid_of, heads_of
from .linear import Linear
from .polarity import join_halves, widen


class PolaPPAttention(nn.Module):
    """The attention layer of PolaFormer++, `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the names and shapes of the official models, whose weights load with
    `strict=True`: `PolaLinearAttention` of the classifiers, `AddLinearAttention` in detection and
    segmentation, and `PolaPPAttention` of DiT, which has no rotary embedding. A picture
    `(B, C, H, W)`, as the first two are given, is `x.flatten(2).transpose(1, 2)` here.

    In float16, features beyond its range are taken as its largest number.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim` into an even number of channels.
        qkv_bias: Adds a bias to the projection of queries, keys, values and gate; the official
            models have it.
        rotary: Whether the numerator is rotated.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or the heads are of odd width.

    Example:
        >>> import torch
        >>> layer = PolaPPAttention(64, num_heads=2)
        >>> layer(torch.randn(2, 7 * 5, 64), 7, 5).shape
        torch.Size([2, 35, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        rotary: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_even_head_dim(dim, num_heads, "its values are of two halves, one for each polarity")
        self.num_heads = num_heads
        factory = {"device": device, "dtype": dtype}
        features = 2 * dim // num_heads
        self.qkvg = Linear(dim, 4 * dim, bias=qkv_bias, **factory)
        self.lepe = DepthwiseConv2d(dim, 5, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.s1 = nn.Parameter(torch.zeros(1, num_heads, 1, features, **factory))
        self.s2 = nn.Parameter(torch.zeros(1, num_heads, 1, features, **factory))
        self.rope = AxialRotary(features, endpoint=True) if rotary else None

    def forward(
        self,
        x: Tensor,
        H: int | None = None,
        W: int | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: `(B, N, C)`, N = H * W.
            H, W: Rows and columns; without them the tokens are a square.
            rotary: What `rope(H, W, x)` returns, to make it once for several layers.

        Returns:
            `(B, N, C)`.

        Raises:
            ValueError: If N is not H * W.
        """
        H, W = grid_of(x.shape[1], H, W)
        if rotary is None and self.rope is not None:
            rotary = self.rope(H, W, x)
        q, k, v, gate, mixed = parts(self.qkvg(x), 4, twice=(2,))
        heads = self.num_heads
        out = self.attend(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), rotary)
        mixed, out, gate = (as_grid(part, H, W) for part in (mixed, out, gate))
        return self.proj(as_tokens(self.lepe(mixed, out, gate)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """o, `(B, N, C)`, of q, k and v `(B, heads, N, d)`."""
        k = spikes(k)
        # Of the queries and of their negatives, read once.
        q_same, q_opposite = signed_map(q, None, sharpness_table(self.s1, self.s2), "expm1", True)
        v_same, v_opposite = v.chunk(2, -1)
        options: dict[str, Any] = {"feature_map": "signed", "eps": 1e-6, "rotary": rotary}
        same = linear_attn(q_same, k, v_same, **options)
        opposite = linear_attn(q_opposite, k, v_opposite, **options)
        return join_halves(same, opposite)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def spikes(x: Tensor, sharpness: Tensor | None = None) -> Tensor:
    """`sign(x) (exp(s |x|) - 1)`, of which the op's "signed" features are phi(x; s).

    Args:
        x: `(B, heads, N, d)`.
        sharpness: `(1, heads, 1, 2 d)`, before the sigmoid that makes s of it: of the positive
            parts, then of the negative ones. None: s = 1.
    """
    table = None if sharpness is None else sharpness_table(sharpness)
    return signed_map(x, None, table, "expm1")[0]


def sharpness_table(*sharpness: Tensor) -> Tensor:
    """s of each `(1, heads, 1, 2 d)`, of positive parts and of negative ones, `(T, heads, d)`."""
    halves = [half for s in sharpness for half in torch.sigmoid(widen(s))[0, :, 0].chunk(2, -1)]
    return torch.stack(halves)

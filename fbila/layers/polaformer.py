"""PolaFormer's token mixer: linear attention that keeps the signs of queries and keys apart.

    k <- k + pos        q, k <- q / softplus(s), k / softplus(s)        p = 1 + alpha sigmoid(w)
    q+ = relu(q)^p, q- = relu(-q)^p, and k+, k- alike                   v = [v_1, v_2]
    o = [LA([q+, q-], [k+, k-], v_1), LA([q-, q+], [k+, k-], v_2)]
    y = W_proj ((o + dwc(v)) * g)

x, y: `(B, N, C)`; LA is `linear_attn` with eps = 1e-6. p is learned for each channel, the gate g is
a linear map of x without activation, and dwc a depthwise convolution over the grid, with the same
d = C / heads kernels for every head.
Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025,
https://arxiv.org/abs/2501.15061; ZacharyMeng/PolaFormer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_attn
from ..ops.parts import parts
from ..ops.signed_map_library import signed_map
from .checks import check_attn_drop, check_even_head_dim, check_kernel_size, check_sr_ratio
from .grid import (
    add_local_mixing,
    as_grid,
    as_pair,
    as_tokens,
    grid_of,
    heads_of,
    reduced_size,
    resize_positions,
)
from .layer_norm import LayerNorm
from .linear import Linear
from .polarity import join_halves, widen


class PolaLinearAttention(nn.Module):
    """The attention layer of PolaFormer, `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the names and shapes of the official models, PolaFormer-PVT and -Swin, whose
    weights load with `strict=True`. The position encoding belongs to the grid `grid_size`, and is
    resized for any other. For PolaFormer-Swin the windows are batch items, made by the caller;
    tokens that a shift brought together are not hidden from each other, there as here.

    In float16, powers beyond its range are taken as its largest number.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim` into an even number of channels.
        qkv_bias: Adds a bias to the projections of queries, keys, values and gate; the official
            models have it.
        attn_drop: Accepted for call sites written for softmax attention; must be 0, since there is
            no attention map to drop entries of. The official layer ignores it.
        proj_drop: Dropout probability after the output projection.
        grid_size: (rows, columns), or the side of a square, that the position encoding is made
            for: the tokens of a PVT stage at its training resolution, or a window of Swin.
        sr_ratio: None: one projection `qkvg` (Swin). A number: `qg` and `kv` (PVT), where keys and
            values come from a grid reduced so many times in each direction, if it is not 1.
        kernel_size: Side of dwc; odd.
        alpha: Powers are between 1 and 1 + alpha.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or the heads are of odd width;
            `attn_drop` is not 0; `kernel_size` is even; `grid_size` or `sr_ratio` is less than 1,
            or the grid smaller than `sr_ratio`.

    Example:
        >>> import torch
        >>> layer = PolaLinearAttention(64, num_heads=2, grid_size=14, sr_ratio=2)
        >>> layer(torch.randn(2, 10 * 12, 64), 10, 12).shape
        torch.Size([2, 120, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        grid_size: int | tuple[int, int],
        sr_ratio: int | None = None,
        kernel_size: int = 5,
        alpha: float = 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_even_head_dim(dim, num_heads, "its values are of two halves, one for each polarity")
        check_attn_drop(attn_drop)
        check_kernel_size(kernel_size)
        check_sr_ratio(sr_ratio)
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.key_grid = reduced_size(*as_pair(grid_size, "grid_size"), sr_ratio or 1)
        self.alpha = alpha
        factory = {"device": device, "dtype": dtype}
        if sr_ratio is None:
            self.qkvg = Linear(dim, 4 * dim, bias=qkv_bias, **factory)
        else:
            self.qg = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
            self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
            if sr_ratio > 1:
                self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **factory)
                self.norm = LayerNorm(dim, for_maps=True, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        d = dim // num_heads
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d, **factory)
        self.power = nn.Parameter(torch.zeros(1, num_heads, 1, d, **factory))
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        rows, columns = self.key_grid
        self.positional_encoding = nn.Parameter(torch.zeros(1, rows * columns, dim, **factory))

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: `(B, N, C)`, N = H * W.
            H, W: Rows and columns; without them the tokens are a square.

        Returns:
            `(B, N, C)`.

        Raises:
            ValueError: If N is not H * W, or one of these less than `sr_ratio`.
        """
        H, W = grid_of(x.shape[1], H, W)
        key_size = reduced_size(H, W, self.sr_ratio or 1)
        if self.sr_ratio is None:
            q, k, v, gate, mixed = parts(self.qkvg(x), 4, twice=(2,))
        else:
            q, gate = parts(self.qg(x), 2)
            if self.sr_ratio > 1:
                x = self.norm(as_tokens(self.sr(as_grid(x, H, W))))
            k, v, mixed = parts(self.kv(x), 2, twice=(1,))
        positions = resize_positions(self.positional_encoding, self.key_grid, key_size)
        out = self.attend(
            heads_of(q, self.num_heads),
            heads_of(k, self.num_heads),
            heads_of(v, self.num_heads),
            positions[0].unflatten(-1, (self.num_heads, -1)),
        )
        return self.proj_drop(self.proj(add_local_mixing(out, self.dwc, mixed, H, W, gate)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """o, `(B, N, C)`, of q `(B, heads, N, d)`, k and v `(B, heads, M, d)`.

        positions: `(M, heads, d)`, to be added to k.
        """
        scale = F.softplus(widen(self.scale)).view(self.num_heads, -1)
        power = 1 + self.alpha * torch.sigmoid(widen(self.power)).view(self.num_heads, -1)
        table = torch.stack((scale, power))
        # sign(x) |x|^p, of which the op's "signed" features are the two powers.
        q, _ = signed_map(q, None, table, "power")
        # The other polarity, of whichever side: of keys there may be fewer.
        k_same, k_opposite = signed_map(k, positions, table, "power", both=True)
        v_same, v_opposite = v.chunk(2, -1)
        same = linear_attn(q, k_same, v_same, feature_map="signed", eps=1e-6)
        opposite = linear_attn(q, k_opposite, v_opposite, feature_map="signed", eps=1e-6)
        return join_halves(same, opposite)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, key_grid={self.key_grid}, "
            f"alpha={self.alpha}"
        )

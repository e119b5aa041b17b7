"""Focused linear attention, the token mixer of FLatten Transformer.

    k <- k + pos        x^ = (relu(x) + 1e-6) / softplus(s)        f(x) = ||x^|| x^p / ||x^p||
    o_i = f(q_i) mean_j(f(k_j)^T v_j) / (f(q_i) . mean_j f(k_j) + 1e-6)
    y = W_proj (o + dwc(v))

x, y: `(B, N, C)`. The norms are over all heads of a token; dwc is a depthwise convolution over the
grid, with the same d = C / heads kernels for every head.
Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023,
https://arxiv.org/abs/2308.00442; LeapLabTHU/FLatten-Transformer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import focused_la
from ..ops.parts import parts
from .checks import check_attn_drop, check_heads, check_kernel_size, check_sr_ratio
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
from .plain_modules import idle


class FocusedLinearAttention(nn.Module):
    """The attention layer of FLatten, `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the names and shapes of the official models, FLatten-PVT, -PVTv2 and -Swin,
    whose weights load with `strict=True`. The position encoding belongs to the grid `grid_size`,
    and is resized for any other. For FLatten-Swin the windows are batch items, made by the caller;
    tokens that a shift brought together are not hidden from each other, there as here.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`.
        qkv_bias: Adds a bias to the query, key and value projections; the official models have it.
        attn_drop: Accepted for call sites written for softmax attention; must be 0, since there is
            no attention map to drop entries of. The official layer ignores it.
        proj_drop: Dropout probability after the output projection.
        grid_size: (rows, columns), or the side of a square, that the position encoding is made
            for: the tokens of a PVT stage at its training resolution, or a window of Swin.
        sr_ratio: None: one projection `qkv` (Swin). A number: `q` and `kv` (PVT), where keys and
            values come from a grid reduced so many times in each direction, if it is not 1.
        focusing_factor: p.
        kernel_size: Side of dwc; odd.

    Raises:
        ValueError: If `num_heads` does not divide `dim`; `attn_drop` is not 0; `kernel_size` is
            even; `grid_size` or `sr_ratio` is less than 1, or the grid smaller than `sr_ratio`.

    Example:
        >>> import torch
        >>> layer = FocusedLinearAttention(64, num_heads=2, grid_size=14, sr_ratio=2)
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
        focusing_factor: float = 3,
        kernel_size: int = 5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_attn_drop(attn_drop)
        check_kernel_size(kernel_size)
        check_sr_ratio(sr_ratio)
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.key_grid = reduced_size(*as_pair(grid_size, "grid_size"), sr_ratio or 1)
        self.focusing_factor = focusing_factor
        factory = {"device": device, "dtype": dtype}
        if sr_ratio is None:
            self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        else:
            self.q = Linear(dim, dim, bias=qkv_bias, **factory)
            self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
            if sr_ratio > 1:
                self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **factory)
                self.norm = LayerNorm(dim, for_maps=True, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        d = dim // num_heads
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d, **factory)
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
        own: Any = self._modules
        H, W = grid_of(x.shape[1], H, W)
        key_size = reduced_size(H, W, self.sr_ratio or 1)
        if self.sr_ratio is None:
            q, k, v, mixed = parts(own["qkv"](x), 3, twice=(2,))
        else:
            q = self.q(x)
            if self.sr_ratio > 1:
                x = self.norm(as_tokens(self.sr(as_grid(x, H, W))))
            k, v, mixed = parts(self.kv(x), 2, twice=(1,))
        positions = resize_positions(self.positional_encoding, self.key_grid, key_size)
        # All are views, which the op reads in place.
        out = focused_la(
            heads_of(q, self.num_heads),
            heads_of(k, self.num_heads),
            heads_of(v, self.num_heads),
            focusing_factor=self.focusing_factor,
            scale=self.scale.view(self.num_heads, -1),
            eps=1e-6,
            key_positions=heads_of(positions, self.num_heads)[0],
        )
        out = add_local_mixing(out.transpose(1, 2).flatten(2), own["dwc"], mixed, H, W)
        out = own["proj"](out)
        return out if idle(own["proj_drop"]) else self.proj_drop(out)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, key_grid={self.key_grid}, "
            f"focusing_factor={self.focusing_factor}"
        )

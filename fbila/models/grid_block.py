"""A transformer block around attention over the whole grid.

    x <- x + attn(norm1(x))        x <- x + mlp(norm2(x))

x: `(B, H, W, C)`; H and W are those of the picture at hand.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn

from ..layers import FocusedLinearAttention, PolaLinearAttention
from ..layers.grid import reduced_size, resize_positions
from ..layers.layer_norm import LayerNorm
from .branch import add_branch
from .casting import casting, paths
from .mlp import Mlp

# They look at numbers of tokens, of which there are none while a graph is traced.
register_notrace_module(FocusedLinearAttention)
register_notrace_module(PolaLinearAttention)

# What reads its input by linear maps and convolutions alone.
_MAPS = (FocusedLinearAttention, PolaLinearAttention)


class GridBlock(nn.Module):
    """The block of PVT, and that of Swin where one window is the whole grid.

    Args:
        attn: A layer `(B, N, C)` to `(B, N, C)` that is called with H and W after the tokens.
        dim: Channels C.
        mlp_ratio: Width of the hidden layer, in C.
        proj_drop: Dropout probability in the MLP.
        drop_path: Probability to leave out either branch, for each picture of a training batch.
        norm_layer: Makes a norm of C channels.
    """

    # Of either layer, with reduced keys or not.
    maps = paths(
        *("attn.qkv", "attn.q", "attn.kv", "attn.qkvg", "attn.qg"),
        *("attn.proj", "mlp.fc1", "mlp.fc2"),
    )

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        if isinstance(self.norm1, LayerNorm):
            self.norm1.for_maps = isinstance(attn, _MAPS)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        if isinstance(self.norm2, LayerNorm):
            self.norm2.for_maps = True
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @casting
    def forward(self, x: Tensor) -> Tensor:
        """Mixes a grid `(B, H, W, C)`."""
        parts: Any = self._modules
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        x = add_branch(x, parts["attn"](parts["norm1"](x), H, W), parts["drop_path1"])
        x = add_branch(x, parts["mlp"](parts["norm2"](x)), parts["drop_path2"])
        return x.view(B, H, W, C)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resizes the positions that the layer has learned, for good."""
        attn: Any = self.attn
        key_grid = reduced_size(*grid_size, attn.sr_ratio or 1)
        attn.positional_encoding = resized(attn.positional_encoding, attn.key_grid, key_grid)
        attn.key_grid = key_grid


def resized(table: nn.Parameter, native: tuple[int, int], size: tuple[int, int]) -> nn.Parameter:
    """The parameter `(1, N, C)` for another grid; itself for its own."""
    with torch.no_grad():
        grid = resize_positions(table, native, size)
    return table if grid is table else nn.Parameter(grid, requires_grad=table.requires_grad)

"""Swin's block of softmax attention in shifted windows, over the grid as it is."""

from functools import partial
from typing import Any

import timm.models.swin_transformer as timm
import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..layers.layer_norm import LayerNorm
from ..layers.linear import Linear
from ..layers.plain_modules import idle, parameter
from ..ops.window_attention_library import window_attention
from .branch import add_branch
from .casting import casting, paths
from .mlp import Mlp


class WindowBlock(timm.SwinTransformerBlock):
    """timm's block, `(B, H, W, C)` to the same shape, for pictures of any size.

    timm's takes the grid apart into windows and puts it together again, with remainders of H and W
    that take minutes to compile where a size is not known beforehand.
    """

    maps = paths("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"norm_layer": partial(LayerNorm, for_maps=True), **options})
        # As timm has made them, but for how they compute.
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            linear.__class__ = Linear
        self.attn.__class__ = WindowAttention
        self.mlp.__class__ = Mlp

    @casting
    def forward(self, x: Tensor) -> Tensor:
        """Mixes a grid `(B, H, W, C)`."""
        parts: Any = self._modules
        mixed = parts["attn"](parts["norm1"](x), self.shift_size)
        x = add_branch(x, mixed, parts["drop_path1"])
        return add_branch(x, parts["mlp"](parts["norm2"](x)), parts["drop_path2"])

    def get_attn_mask(
        self,
        x: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """None: which tokens a shift has brought together is found with their logits."""


# It looks at sizes, of which there are none while a graph is traced.
@register_notrace_module
class WindowAttention(timm.WindowAttention):
    """timm's, for a grid instead of windows; by one kernel on a GPU."""

    def forward(self, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:  # type: ignore[override]
        """Mixes the tokens of each window.

        Args:
            x: `(B, H, W, C)`, of any H and W. Windows that it does not fill have zeros, which are
                seen as tokens.
            shift: The row and the column of the first window.

        Returns:
            `(B, H, W, C)`.
        """
        parts: Any = self._modules
        qkv, dropout, proj_drop = parts["qkv"], parts["attn_drop"], parts["proj_drop"]
        y = window_attention(
            qkv(x),
            parameter(self, "relative_position_bias_table"),
            self._fill(qkv, x),
            self.window_size,
            shift,
            dropout.p if dropout.training else 0.0,
        )
        y = parts["proj"](y)
        return y if idle(proj_drop) else proj_drop(y)

    def _fill(self, qkv: nn.Module, x: Tensor) -> Tensor | None:
        """What qkv makes of zeros; None if nothing of x is in a window that goes beyond it."""
        _, H, W, C = x.shape
        rows, columns = self.window_size
        # Compiled, a remainder would tie a graph for any size to those without one.
        if not torch.compiler.is_compiling() and H % rows == W % columns == 0:
            return None
        # Its bias, where nothing else stands in its place.
        return parameter(qkv, "bias") if hasattr(qkv, "bias") else qkv(x.new_zeros(C))

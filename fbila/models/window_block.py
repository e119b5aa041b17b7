"""Swin's block of softmax attention in shifted windows, over the grid as it is."""

from functools import partial
from typing import Any

import timm.models.swin_transformer as timm
import torch
from timm.layers import register_notrace_module
from torch import Tensor

from ..layers.layer_norm import LayerNorm
from ..layers.linear import Linear
from ..ops.window_attention_library import window_attention
from .mlp import Mlp


class WindowBlock(timm.SwinTransformerBlock):
    """timm's block, `(B, H, W, C)` to the same shape, for pictures of any size.

    timm's takes the grid apart into windows and puts it together again, with remainders of H and W
    that take minutes to compile where a size is not known beforehand.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"norm_layer": partial(LayerNorm, for_maps=True), **options})
        # As timm has made them, but for how they compute.
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            linear.__class__ = Linear
        self.attn.__class__ = WindowAttention
        self.mlp.__class__ = Mlp

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x, self.shift_size)

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
        # What the projection makes of zeros, where something else stands in its place as well.
        fill = self.qkv.bias if hasattr(self.qkv, "bias") else self.qkv(x.new_zeros(x.shape[3]))
        y = window_attention(
            self.qkv(x),
            self.relative_position_bias_table,
            fill,
            self.window_size,
            shift,
            self.attn_drop.p if self.attn_drop.training else 0.0,
        )
        return self.proj_drop(self.proj(y))

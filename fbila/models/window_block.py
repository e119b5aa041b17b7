"""Swin's block of softmax attention in shifted windows."""

from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from torch import Tensor, nn

from ..layers.layer_norm import LayerNorm
from ..layers.linear import Linear
from .mlp import Mlp
from .patches import Fill


class WindowBlock(SwinTransformerBlock):
    """timm's block, `(B, H, W, C)` to the same shape, for pictures of any size.

    timm's computes with remainders of H and W whether or not there are any, which takes minutes to
    compile where a size is not known beforehand, and makes masks that no graph can be traced of.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"norm_layer": partial(LayerNorm, for_maps=True), **options})
        # As timm has made them, but for how they are trained.
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            linear.__class__ = Linear
        self.mlp.__class__ = Mlp
        self.shift_mask = ShiftMask()
        self.fill = Fill()

    def _attn(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        shifted = any(self.shift_size)
        if shifted:
            x = x.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
        x = self.fill(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        # (B, rows of windows, windows in a row, rows, columns, C)
        windows = x.unflatten(2, (-1, self.window_size[1])).unflatten(1, (-1, self.window_size[0]))
        windows = windows.transpose(2, 3)
        B, rows, columns, _, _, _ = windows.shape
        y = self.attn(windows.reshape(-1, self.window_area, self.dim), mask)
        y = y.view(B, rows, columns, *self.window_size, self.dim)
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]
        return y.roll(self.shift_size, (1, 2)) if shifted else y

    def get_attn_mask(
        self,
        x: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        """What hides tokens of a window from each other that a shift brought together."""
        if x is None or not any(self.shift_size):
            return super().get_attn_mask(x, device, dtype)
        return self.shift_mask(x, self.window_size, self.shift_size)


@register_notrace_module
class ShiftMask(nn.Module):
    """0, or -100 for pairs of tokens of a window that lay on opposite sides of the picture.

    A module because it looks at the size, of which there is none while a graph is traced.
    """

    def forward(self, x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        """`(windows, T, T)` for windows of T tokens, of x `(B, H, W, C)` that is shifted."""
        rows, columns = (
            (torch.arange(length, device=x.device) >= length - by).long()
            for length, by in zip(x.shape[1:3], shift, strict=True)
        )
        region = (2 * rows[:, None] + columns)[None, :, :, None]
        region = window_partition(region, window).flatten(1)
        apart = region[:, :, None] != region[:, None, :]
        return x.new_zeros(apart.shape).masked_fill_(apart, -100.0)

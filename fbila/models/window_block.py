"""Swin's block of softmax attention in shifted windows."""

from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from torch import Tensor, nn


class WindowBlock(SwinTransformerBlock):
    """timm's block, which can be traced where the size of pictures is not known beforehand."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shift_mask = ShiftMask()

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

"""A 1 x 1 convolution, as the linear map of tokens that it is where they lie so."""

from typing import Any

from torch import Tensor, nn

from ..ops.casts import cast_of
from ..ops.linear import linear


class PointwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` of 1 x 1 kernels, whose bias costs nothing for a picture in channels_last.

    There a product adds it, where a convolution leaves it to a pass of its own.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.

    Example:
        >>> import torch
        >>> PointwiseConv2d(8, 16)(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_channels, out_channels, 1, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, O, H, W)`, in channels_last if `input` is."""
        if input.dim() != 4 or input.stride(1) != 1:
            return super().forward(input)
        tokens = input.permute(0, 2, 3, 1)
        weight = cast_of(tokens, self.weight).flatten(1)
        return linear(tokens, weight, self.bias).permute(0, 3, 1, 2)

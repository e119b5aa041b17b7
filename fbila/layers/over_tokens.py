"""Convolutions of pictures, given tokens: without views, of which gradients have as many again."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.casts import cast_of
from ..ops.depthwise_conv_library import depthwise_conv
from ..ops.linear import linear
from .depthwise_conv import DepthwiseConv2d
from .plain_modules import parameter, plain
from .pointwise_conv import PointwiseConv2d

# What their modules compute by, as long as nobody has put anything else in its place.
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (DepthwiseConv2d, PointwiseConv2d)}


def over_tokens(module: nn.Module, x: Tensor, *others: Tensor | None, **options: Any) -> Tensor:
    """`(B, H, W, C)` through what takes `(B, C, H, W)`, a view of it.

    A convolution of ours whose call does nothing else is not called, but what it computes by.

    Args:
        module: What takes pictures.
        x: The tokens.
        others, options: Its other arguments; tensors are of tokens, too.

    Example:
        >>> import torch
        >>> over_tokens(DepthwiseConv2d(8, 3), torch.randn(2, 5, 7, 8), residual=True).shape
        torch.Size([2, 5, 7, 8])
    """
    # What else may look on the operators see to; what traces modules has no tensor here.
    if type(x) is Tensor and not torch.compiler.is_compiling() and x.stride(3) == 1:
        if _is_ours(module, DepthwiseConv2d):
            weight, bias = parameter(module, "weight"), parameter(module, "bias")
            return depthwise_conv(x, weight, bias, *others, **options)
        if _is_ours(module, PointwiseConv2d):
            weight = cast_of(x, parameter(module, "weight")).flatten(1)
            return linear(x, weight, parameter(module, "bias"))
    pictures = [None if t is None else t.permute(0, 3, 1, 2) for t in (x, *others)]
    return module(*pictures, **options).permute(0, 2, 3, 1)


def _is_ours(module: nn.Module, kind: type[nn.Module]) -> bool:
    return plain(module, kind) and kind.forward is _FORWARDS[kind]

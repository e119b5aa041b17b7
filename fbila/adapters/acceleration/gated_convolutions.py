"""The gated convolutional feed-forward layers of Sana and DC-AE, and their fast forward.

    h = x W_1 + b_1,   u = dwconv(SiLU(h)) + b,   y = (a SiLU(g)) W_2,   u = [a, g]

x `(B, H, W, C)`. Stock adds its biases after the convolutions, and goes over h, which is several
times as wide as x, six times; for gradients it keeps four times as much as h. Here h and what W_2
multiplies are kept, one and a half times as much.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.gated_conv_library import gated_depthwise_conv
from ..kernel_checks import plain, pointwise, serves, takes


def feed_forward(module: Any, x: Tensor) -> Tensor:
    """The three convolutions of `module` on contiguous x `(B, H, W, C)`."""
    expand, depth, reduce = module.conv_inverted, module.conv_depth, module.conv_point
    # The hidden layer has no name here, and so is gone before the output is made, if no gradient
    # is wanted. Under autocast the taps stay as they are: the kernels' sums are wider anyway.
    gated = gated_depthwise_conv(
        F.linear(x, expand.weight.flatten(1), expand.bias), depth.weight, depth.bias
    )
    return F.linear(gated, reduce.weight.flatten(1), reduce.bias)


def serves_feed_forward(module: Any, x: Tensor) -> bool:
    """Whether `feed_forward` stands for stock's convolutions of x."""
    convolutions = module.conv_inverted, module.conv_depth, module.conv_point
    return (
        serves(x)
        and not why_not_convolutions(module)
        and all(
            takes(weight, x)
            for convolution in convolutions
            for weight in convolution._parameters.values()
            if weight is not None
        )
    )


def why_not_convolutions(module: Any) -> str:
    """Why `feed_forward` is not what a module computes; `""` if it is."""
    if not plain(module.nonlinearity, nn.SiLU):
        return f"has the activation {type(module.nonlinearity).__name__}, not a plain SiLU"
    for name in ("conv_inverted", "conv_point"):
        if not pointwise(getattr(module, name)):
            return f"has a {name} that is not a plain 1 x 1 convolution"
    if not _depthwise(module.conv_depth):
        return "has a conv_depth that is not a plain depthwise 3 x 3 convolution"
    return ""


def _depthwise(conv: Any) -> bool:
    return (
        plain(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding_mode == "zeros"
        and type(conv.weight) is nn.Parameter
    )

"""The aggregation of neighbouring tokens that makes a scale of multi-scale linear attention.

    y = pointwise * (depthwise * x)                 x and y are `(B, C, height, width)`

The depthwise convolution is k x k, the pointwise one is of the channels of a query, key or value.
Convolutions in that many groups take cuDNN several launches each; both are one kernel here, for
inference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.autograd import needs_gradient
from ...ops.separable_conv_library import MAX_GROUP, separable_conv2d
from ..unet.block_checks import has_kernels, plain, read_by_maps, transformed

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def aggregate(x: Tensor, stock: nn.Module, kind: type[nn.Module]) -> Tensor:
    """`stock(x)`, where modules of class `kind` are two convolutions, one after the other."""
    convolutions: list[Any] = list(stock.children())
    if plain(stock, kind) and len(convolutions) == 2 and _one_kernel(x, *convolutions):
        first, second = convolutions
        return separable_conv2d(x, first.weight, first.bias, second.weight, second.bias)
    return stock(x)


def _one_kernel(x: Tensor, depthwise: Any, pointwise: Any) -> bool:
    """Whether the kernel stands for the two of them on x."""
    # Compilers are given the operator, whose fake kernel they know; the others see convolutions.
    if not torch.compiler.is_compiling() and (
        transformed() or torch._C._get_tracing_state() is not None
    ):
        return False
    if type(x) is not Tensor or x.dim() != 4 or not has_kernels(x):
        return False
    if x.dtype not in _DTYPES or read_by_maps(x) != x.dtype:
        return False
    if not _is_depthwise(depthwise, x.shape[1]) or not _is_pointwise(pointwise, x.shape[1]):
        return False
    weights = (depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias)
    return all(_fits(weight, x) for weight in weights) and not needs_gradient(x, *weights)


def _is_depthwise(conv: Any, channels: int) -> bool:
    """Whether it is a plain convolution of each channel by itself that keeps height and width."""
    if not plain(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    size = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels == channels
        and conv.kernel_size == (size, size)
        and size % 2 == 1
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in ("same", (size // 2, size // 2))
    )


def _is_pointwise(conv: Any, channels: int) -> bool:
    """Whether it is a plain 1 x 1 convolution in groups that a program holds."""
    return (
        plain(conv, nn.Conv2d)
        and conv.in_channels == conv.out_channels == channels
        and channels <= conv.groups * MAX_GROUP
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ("same", "valid", (0, 0))
    )


def _fits(weight: Any, x: Tensor) -> bool:
    """Whether it is an ordinary weight beside x, or none."""
    return weight is None or (
        type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
    )

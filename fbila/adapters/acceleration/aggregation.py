"""The aggregation of neighbouring tokens that makes a scale of multi-scale linear attention.

    y = pointwise * (depthwise * x)                 x and y are `(B, C, height, width)`

The depthwise convolution is k x k, the pointwise one is of the channels of a query, key or value.
Convolutions in that many groups take cuDNN several launches each; both are one kernel here, for
inference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...layers.plain_modules import is_depthwise, is_pointwise, plain
from ...ops.autograd import needs_gradient
from ...ops.separable_conv_library import MAX_GROUP, separable_conv2d
from ..kernel_checks import has_kernels, read_by_maps, transformed

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Of a depthwise and a pointwise convolution: weight, bias, weight, bias.
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def aggregate(x: Tensor, stock: nn.Module, kind: type[nn.Module]) -> Tensor:
    """`stock(x)`, where modules of class `kind` are two convolutions, one after the other."""
    weights = weights_of(stock, kind, x, x.shape[1]) if _one_kernel(x) else None
    if weights is None or needs_gradient(x, *weights):
        return stock(x)
    return separable_conv2d(x, *weights)


def weights_of(stock: nn.Module, kind: type[nn.Module], x: Tensor, channels: int) -> Weights | None:
    """Those of `stock`, if it is a `kind` of two convolutions that the kernel stands for.

    Of pictures of so many channels, in the dtype and on the device of x.
    """
    convolutions: tuple[Any, ...] = tuple(stock._modules.values())
    if not plain(stock, kind) or len(convolutions) != 2:
        return None
    first, second = convolutions
    if not is_depthwise(first, channels) or not _in_groups(second, channels):
        return None
    weights: Any = (first.weight, first.bias, second.weight, second.bias)
    return weights if all(fits(weight, x) for weight in weights) else None


def _one_kernel(x: Tensor) -> bool:
    """Whether the kernel runs on x, or an operator that stands for it in a graph."""
    # Compilers are given the operator, whose fake kernel they know; the others see convolutions.
    if not torch.compiler.is_compiling() and (
        transformed() or torch._C._get_tracing_state() is not None
    ):
        return False
    if type(x) is not Tensor or x.dim() != 4 or not has_kernels(x):
        return False
    return x.dtype in _DTYPES and read_by_maps(x) == x.dtype


def _in_groups(conv: Any, channels: int) -> bool:
    """Whether it is a plain 1 x 1 convolution in groups that a program holds."""
    return (
        is_pointwise(conv)
        and conv.in_channels == conv.out_channels == channels
        and channels <= conv.groups * MAX_GROUP
    )


def fits(weight: Any, x: Tensor) -> bool:
    """Whether it is an ordinary weight beside x, or none."""
    return weight is None or (
        type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
    )

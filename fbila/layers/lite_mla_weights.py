"""When LiteMLA is one operation on a GPU, and the weights that it has then."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autograd import ordinary
from ..ops.depthwise_conv_library import KERNEL_SIZES
from ..ops.tensor_checks import MAX_HEAD_DIM
from .plain_modules import is_depthwise, is_pointwise, plain

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def has_kernels(x: Tensor) -> bool:
    return x.is_cuda


def weights_of(layer: Any, x: Tensor) -> list[Tensor | None] | None:
    """The weights of a `LiteMLA` as `fbila::lite_mla` takes them.

    None where the operation does not stand for the modules of the layer: a module was replaced or
    has a hook, or a tensor is of another kind than kernels are for.
    """
    if type(x) is not Tensor or x.dim() != 4 or not has_kernels(x):
        return None
    # Compilers are given the operation; what else traces or transforms sees the modules.
    if not torch.compiler.is_compiling() and not ordinary(x):
        return None
    convolutions = _convolutions(layer)
    if convolutions is None or layer.dim > MAX_HEAD_DIM:
        return None
    weights: list[Tensor | None] = []
    for conv in convolutions:
        weights += [conv.weight, conv.bias]
    fit = x.dtype in _DTYPES and x.numel() > 0
    return weights if fit and all(_fits(weight, x) for weight in weights) else None


def _convolutions(layer: Any) -> list[Any] | None:
    """`qkv`, those of each further scale, and `proj`; None if they are not what they began as."""
    sequences = (layer.qkv, *layer.aggreg._modules.values(), layer.proj)
    if not all(plain(sequence, nn.Sequential) for sequence in sequences):
        return None
    qkv, *aggregations, proj = (list(sequence._modules.values()) for sequence in sequences)
    wide, heads = 3 * layer.heads * layer.dim, 3 * layer.heads
    for pair in aggregations:
        if len(pair) != 2 or not is_depthwise(pair[0], wide) or not is_pointwise(pair[1]):
            return None
        grouped = (wide, wide, heads) == (pair[1].in_channels, pair[1].out_channels, pair[1].groups)
        if pair[0].kernel_size[0] not in KERNEL_SIZES or not grouped:
            return None
    ends = [*qkv, *proj[:1]]
    if len(ends) != 2 or not all(is_pointwise(conv) and conv.groups == 1 for conv in ends):
        return None
    first, last = ends
    mixed = layer.heads * layer.dim * (1 + len(aggregations))
    if first.out_channels != wide or last.in_channels != mixed:
        return None
    return [first, *(conv for pair in aggregations for conv in pair), last]


def _fits(weight: Any, x: Tensor) -> bool:
    """Whether it is an ordinary weight beside x, or none; autocast casts those of other dtypes."""
    if weight is None:
        return True
    cast = torch.is_autocast_enabled(x.device.type) and weight.dtype in _DTYPES
    return (
        type(weight) is nn.Parameter
        and weight.device == x.device
        and (cast or weight.dtype == x.dtype)
    )

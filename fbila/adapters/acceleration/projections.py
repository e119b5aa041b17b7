"""Several linear maps of one input as one product, with their weights side by side."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernel_checks import plain


def concatenated(maps: Sequence[Any], x: Tensor) -> Tensor:
    """The outputs of linear maps `(..., D)` side by side, by one product where that is right."""
    if _alike(maps):
        return product(maps, x)
    return torch.cat([each(x) for each in maps], dim=-1)


def product(maps: Sequence[Any], x: Tensor) -> Tensor:
    """`x` `(..., D)` times the weights of the maps side by side.

    They are put together in every call, which is cheap beside the product.
    """
    return F.linear(x, torch.cat([each.weight for each in maps]))


def trained_together(maps: Sequence[Any]) -> bool:
    """Whether one product stands for these maps, and saves more than it costs.

    It does in training: one gradient of the input is cast, in place of three that are cast and
    added up, and half as many kernels are launched. Compilers do better with maps as they are.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _alike(maps)
        and all(each.weight.requires_grad for each in maps)
    )


def _alike(maps: Sequence[Any]) -> bool:
    """Whether they are plain linear maps without biases, and of one dtype."""
    return all(
        plain(each, nn.Linear)
        and each.bias is None
        and type(each.weight) is nn.Parameter
        and each.weight.dtype == maps[0].weight.dtype
        for each in maps
    )

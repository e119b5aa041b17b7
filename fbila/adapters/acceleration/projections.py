"""Several linear maps of one input as one product, with their weights side by side."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernel_checks import plain


def concatenated(maps: Sequence[Any], x: Tensor) -> Tensor:
    """The outputs of linear maps `(..., D)` side by side, as one map where that is all they do.

    Their weights are put together in every call, which is cheap beside their outputs.
    """
    if all(_bare(each) and each.weight.dtype == maps[0].weight.dtype for each in maps):
        return F.linear(x, torch.cat([each.weight for each in maps]))
    return torch.cat([each(x) for each in maps], dim=-1)


def trained_together(maps: Sequence[Any]) -> bool:
    """Whether one product of these maps saves more than putting their weights together costs.

    Their gradients then cast and add up one gradient of their input, not one for each of them, and
    launch half as many kernels. Compilers do better with maps as they are.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(
            _bare(each) and each.weight.requires_grad and each.weight.dtype == maps[0].weight.dtype
            for each in maps
        )
    )


def _bare(module: nn.Module) -> bool:
    """Whether it is a plain linear map without bias."""
    return plain(module, nn.Linear) and module.bias is None and type(module.weight) is nn.Parameter

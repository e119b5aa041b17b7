"""What kernels without a gradient do in accelerated models, and when."""

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.rms_norm_library import rms_norm
from ..host import host
from ..kernel_checks import plain, read_by_maps, serves

with host("diffusers"):
    from diffusers.models.normalization import RMSNorm

_HALF = (torch.float16, torch.bfloat16)


def infers(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether kernels without a gradient stand for stock's on x, by these modules' own weights.

    Not where autocast would cast what they read, nor while a graph is made: compilers fuse the
    same by themselves.
    """
    return (
        serves(x, *modules)
        and read_by_maps(x) == x.dtype
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def normalize(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)` `(..., D)`, by one kernel where it is a plain `RMSNorm` of diffusers'."""
    if not (infers(x, norm) and plain(norm, RMSNorm) and norm.dim == x.shape[-1:]):
        return norm(x)
    return rms_norm(x, norm.weight, norm.bias, norm.eps, dtype_of(norm, x))


def dtype_of(norm: RMSNorm, x: Tensor) -> torch.dtype:
    """What diffusers' `RMSNorm` returns: a weight of half precision rounds, a wider one widens."""
    if norm.weight is None:
        return x.dtype
    dtype = norm.weight.dtype
    if dtype not in _HALF:
        dtype = torch.promote_types(dtype, torch.promote_types(x.dtype, torch.float32))
    return dtype if norm.bias is None else torch.promote_types(dtype, norm.bias.dtype)

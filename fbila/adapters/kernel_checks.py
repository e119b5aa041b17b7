"""When kernels stand for what a host's modules do: its inputs, its modules and their state."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.plain_modules import plain
from ..ops.group_sizes import is_short

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What autocast casts.
_CAST = _DTYPES[:3]


def has_kernels(x: Tensor) -> bool:
    return x.is_cuda


def serves(x: Any, *modules: nn.Module | None) -> bool:
    """Whether the kernels stand for a stock forward on x that uses these modules' own weights.

    They have gradients of x alone, unless these are left out. Modules within these, such as LoRAs,
    may be trained.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) is not Tensor or not has_kernels(x) or transformed():
        return False
    if torch.is_grad_enabled() and any(map(trained, modules)):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype in (torch.float32, read_by_maps(x)) and x.numel() > 0
    return x.dtype in _DTYPES and x.numel() > 0


def in_graph(x: Any, norm: Any) -> bool:
    """Whether the graph that a compiler makes of a stock forward is to have the kernel of its norm.

    Inductor's own norms are as fast where groups are small, and sooner launched.
    """
    return (
        # Not what exports by running Python.
        torch.compiler.is_dynamo_compiling()
        and has_kernels(x)
        and x.dtype in _CAST
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not is_short(x.shape, norm.num_groups)
    )


def transformed() -> bool:
    """Whether a transform of torch.func, or a forward derivative, is under way."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def trained(module: nn.Module | None) -> bool:
    """Whether weights of the module itself, not of those within it, are to have gradients."""
    if module is not None:
        for weight in module._parameters.values():
            if weight is not None and weight.requires_grad:
                return True
    return False


def read_by_maps(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions and linear maps read x, or a norm of x."""
    kind = x.device.type
    # Autocast does not know the meta device.
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def takes(weight: Any, x: Tensor) -> bool:
    """Whether a norm or a convolution of x may have this weight."""
    if torch.is_autocast_enabled(x.device.type):
        return weight.dtype in _CAST and weight.device == x.device
    return weight.dtype == x.dtype and weight.device == x.device


def plain_norm(norm: Any, kind: type, x: Tensor) -> bool:
    """Whether it is a norm like this with weights that the kernels take."""
    return (
        plain(norm, kind)
        and norm.weight is not None
        and norm.bias is not None
        and takes(norm.weight, x)
    )


def pointwise(conv: Any) -> bool:
    """Whether it is a plain 1 x 1 convolution, which is a linear map of every position."""
    return (
        plain(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and type(conv.weight) is nn.Parameter
    )

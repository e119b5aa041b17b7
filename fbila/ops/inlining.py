"""Kernels in what torch.compile makes: Inductor launches them itself, as it does its own.

Called as an op, a kernel is reached by way of the dispatcher and Python, which takes several times
as long as launching it. Here an op is taken apart into its allocations and launches as its graph is
traced: for inference the op itself, for training those of its forward and its backward pass, which
autograd's function calls below it. What is kept in between is what that function keeps: compilers
do not run again what launches a kernel. Where that cannot be, the op stays in the graph: in what
torch.export writes; with sizes that are symbols, which blocks are not chosen by.

Of the options of a launch Inductor passes on warps and stages, and not every version the others: a
kernel that needs one of those to be right stays an op.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.library import wrap_triton

from .library import LIBRARY
from .written import remember_what_is_written

# Inductor gives numbers that fit 32 bits, and products of them with indices must fit, too.
_MOST = 2**31
# Of a Hopper GPU. With less, launches may have to drop stages, which only shows as they run.
_SHARED_MEMORY = 227 * 1024


def inline(op: str, in_kernel: Callable) -> None:
    """Take `fbila::op` apart where `in_kernel`, its implementation on CUDA, can be traced."""

    def take_apart(mode: Any, overload: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if kwargs or not all(map(_inlined, tensors)) or _exports():
            return mode.__torch_dispatch__(overload, types, args, kwargs or {})
        with mode:
            return in_kernel(*args)

    torch.library.register_torch_dispatch(
        f"fbila::{op}", FunctionalTensorMode, take_apart, lib=LIBRARY
    )


def traced(x: torch.Tensor) -> bool:
    """Whether launches on x are to become part of a graph."""
    return isinstance(x, FunctionalTensor)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Make `kernel[grid](*tensors, *numbers, **constants, **options)` part of the graph."""
    remember_what_is_written()
    wrap_triton(kernel)[grid](*tensors, *numbers, **constants, **options)


def _inlined(x: torch.Tensor) -> bool:
    sizes = (*x.shape, *x.stride())
    return (
        traced(x)
        and x.dtype != torch.float64
        and all(type(n) is int for n in sizes)
        and max(x.numel(), _extent(x)) < _MOST
        and _shared_memory(x.device) >= _SHARED_MEMORY
    )


def _extent(x: torch.Tensor) -> int:
    return 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _exports() -> bool:
    return torch.compiler.is_exporting()

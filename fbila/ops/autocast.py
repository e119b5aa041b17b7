"""What `torch.autocast` does to the inputs of the operators, and how to keep it out."""

from contextlib import AbstractContextManager, nullcontext

import torch


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the autocast dtype inside `torch.autocast`; float64 is left alone there."""
    first = tensors[0]
    # Autocast does not know the meta device.
    if not isinstance(first, torch.Tensor) or first.device.type == "meta":
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast casts to on the device of x, None outside of it; not while compiling."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def stays(x: torch.Tensor) -> bool:
    """Whether autocast leaves x as it is; sooner found than a cast, but not while compiling."""
    if not torch._C._is_any_autocast_enabled():
        return True
    return x.dtype == torch.get_autocast_dtype(x.device.type)


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Where autocast would take float32 products back to half precision."""
    if x.is_meta:
        return nullcontext()
    # In eager mode it is known that there is nothing to keep out.
    if not (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)

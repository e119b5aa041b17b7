"""Operators that have no gradient, for forward passes that none is wanted of."""

from typing import Any

import torch

from .autograd import needs_gradient
from .library import LIBRARY


def inference_only(op: str) -> None:
    """Make the dispatcher refuse `fbila::{op}` where a gradient is wanted, not give a zero one."""

    def run(*arguments: Any) -> Any:
        require_no_gradient(op, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fbila, op)(*arguments)

    LIBRARY.impl(op, run, "Autograd")


def require_no_gradient(op: str, *arguments: Any) -> None:
    """Raises NotImplementedError if one of the tensors among these is to have a gradient."""
    if needs_gradient(*(x for x in arguments if isinstance(x, torch.Tensor))):
        raise NotImplementedError(f"{op} has no gradient. Use PyTorch's own operators for that.")

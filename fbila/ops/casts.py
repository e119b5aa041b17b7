"""Weights that autocast would cast one by one, cast at once.

Under autocast each linear map casts its weight and its bias, and each of their gradients is cast
back: small kernels, with a node each in the graph, which take several times as long to launch as to
run. Those of a block of layers are cast by one kernel here, and so are their gradients.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .autograd import ordinary


class _Casts(threading.local):
    """Those of the blocks that this thread is in, by the parameter's id."""

    now: dict[int, Tensor] = {}  # noqa: RUF012  replaced, never changed


_CASTS = _Casts()


class cast_together:
    """While it lasts, `cast_of` knows the casts of these float32 parameters for autocast's dtype.

    Nothing happens outside of autocast, or where something may look on: while compiling, within
    transforms of torch.func, for parameters of another dtype.

    Args:
        x: What the maps are given, on their device.
        parameters: Of the maps.
    """

    def __init__(self, x: Tensor, parameters: Sequence[Tensor]) -> None:
        self.x, self.parameters = x, parameters

    def __enter__(self) -> None:
        self.before = _CASTS.now
        dtype = autocast_dtype(self.x)
        if dtype is None or len(self.parameters) < 2 or not ordinary(self.x, *self.parameters):
            return
        for p in self.parameters:
            if p.dtype != torch.float32 or p.device != self.x.device:
                return
        casts = _CastTogether.apply(dtype, *self.parameters)
        _CASTS.now = {**self.before, **dict(zip(map(id, self.parameters), casts, strict=True))}

    def __exit__(self, *_: Any) -> None:
        _CASTS.now = self.before


def cast_of(x: Tensor, parameter: Any) -> Any:
    """The cast of `parameter` for autocast of x, where there is one already; else itself."""
    # First, as compilers do not know what belongs to a thread.
    if torch.compiler.is_compiling() or not _CASTS.now:
        return parameter
    cast = _CASTS.now.get(id(parameter))
    return parameter if cast is None or cast.dtype != autocast_dtype(x) else cast


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *parameters):
        ctx.set_materialize_grads(False)
        made = [torch.empty_like(p, dtype=dtype) for p in parameters]
        torch._foreach_copy_(made, parameters)
        # Or gradients of frozen ones would be computed.
        frozen = [t for t, p in zip(made, parameters, strict=True) if not p.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(made)

    @staticmethod
    def backward(ctx, *gradients):
        given = [g for g in gradients if g is not None]
        if torch.is_grad_enabled():
            # For gradients of gradients.
            wide = [g.float() for g in given]
        else:
            wide = [torch.empty_like(g, dtype=torch.float32) for g in given]
            torch._foreach_copy_(wide, given)
        each = iter(wide)
        return (None, *[None if g is None else next(each) for g in gradients])

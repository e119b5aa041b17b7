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
# Each parameter with its cast where torch.compile traces, which does not know what belongs to a
# thread. It changes nothing but its own idea of this list, as long as that is as it was where a
# graph ends.
TRACED: list[tuple[Tensor, Tensor]] = []


class cast_together:
    """While it lasts, `cast_of` knows the casts of these float32 parameters for autocast's dtype.

    Nothing happens outside of autocast, within transforms of torch.func, for parameters of another
    dtype, in compiled graphs, which have `traced_casts`.

    Args:
        x: What the maps are given, on their device.
        parameters: Of the maps.
    """

    def __init__(self, x: Tensor, parameters: Sequence[Tensor]) -> None:
        self.x, self.parameters = x, parameters
        self.before: dict[int, Tensor] | None = None

    def __enter__(self) -> None:
        # Where a graph has ended within the block, this may be a graph of its own.
        if torch.compiler.is_dynamo_compiling():
            return
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
        if self.before is not None:
            _CASTS.now = self.before


def cast_of(x: Tensor, parameter: Any) -> Any:
    """The cast of `parameter` for autocast of x, where there is one already; else itself."""
    if torch.compiler.is_dynamo_compiling():
        for traced, found in TRACED:
            if traced is parameter and found.dtype == _traced_dtype(x):
                return found
        return parameter
    if not _CASTS.now:
        return parameter
    cast = _CASTS.now.get(id(parameter))
    return parameter if cast is None or cast.dtype != autocast_dtype(x) else cast


def traced_casts(x: Tensor, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What to have in `TRACED` while a block is traced; Inductor makes one kernel of them.

    None within checkpoints, whose graphs may not change a list from outside of them, either.
    """
    dtype = _traced_dtype(x)
    if dtype is None or not _is_free():
        return []
    wanted = torch.is_grad_enabled()
    served: list[Tensor] = []
    for p in parameters:
        # Autograd's function takes nothing twice, such as what two maps share.
        if p.dtype != torch.float32 or p.device != x.device or any(p is s for s in served):
            continue
        # Gradients of frozen ones would be computed.
        if p.requires_grad or not wanted:
            served.append(p)
    if len(served) < 2:
        return []
    return list(zip(served, _TracedCasts.apply(dtype, *served), strict=True))


def _traced_dtype(x: Tensor) -> torch.dtype | None:
    """`autocast_dtype` for those that trace."""
    kind = x.device.type
    # Autocast does not know the meta device.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_free() -> bool:
    """Whether what torch.compile traces is in no function that it traces on its own.

    Nor in what torch.func transforms or torch.export takes.
    """
    from torch._dynamo.current_scope_id import current_scope_id

    if torch.compiler.is_exporting():
        return False
    return current_scope_id() == 1 and torch._C._functorch.peek_interpreter_stack() is None


# Called while it traces, not traced: `torch.compiler.assume_constant_result` without its import.
_is_free._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


class _TracedCasts(torch.autograd.Function):
    """The same for a graph, of gradients that are all there and have none of their own."""

    @staticmethod
    def forward(ctx, dtype, *parameters):
        return _copies(parameters, dtype)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *_copies(gradients, torch.float32)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    empty = [torch.empty_like(t, dtype=dtype) for t in tensors]
    # In place, the results would be leaves of their own to torch.compile of PyTorch 2.11.
    return tuple(torch.ops.aten._foreach_copy.default(empty, list(tensors)))

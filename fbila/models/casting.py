"""Blocks whose linear maps have their weights cast for autocast at once."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..layers.linear import Linear
from ..layers.plain_modules import plain
from ..layers.pointwise_conv import PointwiseConv2d
from ..ops.casts import TRACED, cast_together, traced_casts

# What they compute by, as long as nobody has put anything else in its place.
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (Linear, PointwiseConv2d)}


def casting(forward: Callable) -> Callable:
    """`forward(block, x, ...)`, with the weights of the block's `maps` cast together.

    These are the names of its linear maps; what else stands in their place casts its own.
    """

    @wraps(forward)
    def run(block: Any, x: Tensor, *others: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            before = len(TRACED)
            # A graph cannot end within this, and with nothing in it before it does not begin here,
            # either, so that nothing but what is traced finds the list changed.
            try:
                casts = traced_casts(x, parameters_of(block))
                if casts:
                    TRACED.extend(casts)
                return forward(block, x, *others)
            finally:
                if len(TRACED) > before:
                    TRACED[:] = TRACED[:before]
        if not torch._C._is_any_autocast_enabled():
            return forward(block, x, *others)
        # What traces modules has no tensor here, and autocast does not know the meta device.
        if type(x) is not Tensor or x.is_meta:
            return forward(block, x, *others)
        with cast_together(x, parameters_of(block)):
            return forward(block, x, *others)

    return run


def parameters_of(block: Any) -> list[Tensor]:
    """Of those of its maps that are as they were made."""
    found: list[Tensor] = []
    for path in block.maps:
        module: Any = block
        for name in path:
            module = None if module is None else module._modules.get(name)
        kind: Any = type(module)
        if kind in _FORWARDS and plain(module, kind) and kind.forward is _FORWARDS[kind]:
            found += [p for p in module._parameters.values() if p is not None]
    return found


def paths(*names: str) -> tuple[tuple[str, ...], ...]:
    """For `maps` of a block, by names with points in between."""
    return tuple(tuple(name.split(".")) for name in names)

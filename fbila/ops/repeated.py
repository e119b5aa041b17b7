"""Calls like one before: their checks have passed, and need not be made again.

The checks take a third of the host's time for a small input. What they depend on is remembered:
everything about the tensors but their values and strides, and the options.
"""

from typing import Any

import torch

from .autograd import ordinary

# More kinds of calls than any model makes; a program that makes more pays for the checks.
MOST = 4096
_PASSED: set[Any] = set()


def signature(q: Any, k: Any, v: Any, *options: Any) -> tuple | None:
    """What the checks of a call depend on; None where calls are not to be told apart by that."""
    if q is None or k is None or v is None or not ordinary(q, k, v):
        return None
    if q.is_nested or k.is_nested or v.is_nested:
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    return (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        q.layout, k.layout, v.layout, *options,
    )  # fmt: skip


def passed(call: tuple | None) -> bool:
    return call is not None and call in _PASSED


def remember(call: tuple | None) -> None:
    if call is not None and len(_PASSED) < MOST:
        _PASSED.add(call)

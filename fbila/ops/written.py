"""What kernels write to, worked out once: compilers ask anew for every launch in a graph.

PyTorch reads it off the code that Triton makes of a kernel, which takes a tenth of a second, and
does so three times for each launch. A model has hundreds, for which that takes longer than all else
that its compiler's main thread does; but the layers of a stage launch the same kernels with the
same arguments, so that there are few different answers.
"""

from collections.abc import Callable
from copy import copy
from functools import cache, wraps
from typing import Any

import torch

# By the name that a version of PyTorch has for it.
_ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")
_PACKAGE = __name__.partition(".")[0]


@cache
def remember_what_is_written() -> None:
    """Make PyTorch remember it, of the kernels of this package alone."""
    # With Inductor, which only compilers need.
    from torch._higher_order_ops import triton_kernel_wrap

    for name in _ANALYSES:
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is not None:
            setattr(triton_kernel_wrap, name, remembered(analyse))


def remembered(analyse: Callable) -> Callable:
    """`analyse(kernel, arguments, ...)`, by the answer of a call like this one before."""
    answers: dict[Any, Any] = {}

    @wraps(analyse)
    def answer(*given: Any, **named: Any) -> Any:
        # Descriptors come third, of which there are none here.
        case = None if named or any(given[2:]) else _case(*given[:2])
        if case is None:
            return analyse(*given, **named)
        if case not in answers:
            answers[case] = analyse(*given)
        return copy(answers[case])

    return answer


def _case(kernel: Any, arguments: dict[str, Any]) -> Any:
    """All that an answer depends on, or None where it is not ours to remember."""
    # A launch with options comes as an autotuner of its own, with one choice.
    configs = getattr(kernel, "configs", None)
    if configs:
        kernel, arguments = kernel.fn, {**arguments, **configs[0].kwargs}
    if str(getattr(kernel, "module", "")).partition(".")[0] != _PACKAGE:
        return None
    return kernel, frozenset((name, *_kind(x)) for name, x in arguments.items())


def _kind(x: Any) -> tuple[Any, Any]:
    """Of tensors the dtype alone, as it is for the analysis."""
    if isinstance(x, torch.Tensor):
        return torch.Tensor, x.dtype
    # Inductor's.
    if hasattr(x, "get_dtype"):
        return torch.Tensor, x.get_dtype()
    return type(x), x

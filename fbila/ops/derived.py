"""What is worked out of tensors that many calls are given, once for all of them.

The layers of a model are given the same tables of a rotation, in every forward pass; what the
kernels take is made of them by a few small kernels a layer, which take longer to launch than to
run. It is kept for as long as the tensors are there, and are what they were.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .autograd import ordinary

R = TypeVar("R")
# First tensor -> (what it was made for, the other tensors, what was made).
_KEPT: Any = WeakTensorKeyDictionary()


def derived(make: Callable[[], R], settings: Hashable, *sources: torch.Tensor) -> R:
    """`make()`, or what it returned for the same `sources` and `settings` the last time.

    It is made anew for sources that have changed, that are traced, or that want a gradient.

    Args:
        make: Computes something from `sources` and `settings` alone, and no view of the first one,
            which would be there for ever.
        settings: What else it depends on, and what tells it from other things made of them.
    """
    if not _known(sources):
        return make()
    state = (settings, *map(_state, sources))
    first, *others = sources
    kept = _KEPT.get(first)
    if kept is not None and kept[0] == state and all(map(_is, kept[1], others)):
        return kept[2]
    # Not of inference mode, so that a later call can differentiate with it.
    with torch.inference_mode(False):
        result = make()
    _KEPT[first] = state, [weakref.ref(x) for x in others], result
    return result


def _is(reference: weakref.ref, x: torch.Tensor) -> bool:
    return reference() is x


def _known(sources: tuple[torch.Tensor, ...]) -> bool:
    """Whether it can be told if they have changed, and what is made of them is there at once."""
    if not ordinary(*sources):
        return False
    if any(x.requires_grad or x.is_inference() for x in sources):
        return False
    # While a CUDA graph is captured nothing is computed yet, and its memory is its own.
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _state(x: torch.Tensor) -> tuple[Hashable, ...]:
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    # Their contents are counted, but `x.data = y` is not.
    return x._version, x.data_ptr(), x.dtype, x.device, x.shape, x.stride(), stream

"""Passes made again: what a call like this one before has allocated and launched is known.

Finding out what to allocate and launch takes the host several times as long as doing it, and
depends on the options and on everything about the tensors but their values. The first call of a
kind is watched; where it does nothing but allocate and launch, the next ones are its `Program`.
"""

from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# More kinds of calls than any model makes; a program that makes more goes the general way.
MOST = 4096
_PROGRAMS: dict[Any, "Program | None"] = {}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = {type(None), bool, int, float, str, torch.dtype}

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_HARMLESS = {
    _aten.promote_types.default,
    _aten.detach.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten.t.default,
}


def replayed(run: Callable) -> Callable:
    """`run`, by the `Program` of a call of the same kind where there is one.

    Its arguments, by position, are tensors, None, and options that with everything but the values
    of the tensors determine what is launched.
    """

    @wraps(run)
    def replay(*arguments):
        # Within a watched call others are part of it.
        if torch._C._len_torch_dispatch_stack():
            return run(*arguments)
        kind, pointers = [run], []
        bits = 0
        for x in arguments:
            of = type(x)
            if of in _TENSORS:
                kind += (x.shape, x.stride(), x.dtype, x.get_device())
                pointer = x.data_ptr()
                pointers.append(pointer)
                bits |= pointer
            elif of in _PLAIN:
                kind.append(x)
            elif of is list or of is tuple:
                kind.append(tuple(x))
            else:
                return run(*arguments)
        key = tuple(kind)
        program = _PROGRAMS.get(key, _UNKNOWN)
        if program is _UNKNOWN:
            return _first(key, run, arguments)
        made = None if program is None else program(pointers, bits)
        return run(*arguments) if made is None else made

    return replay


class Program:
    """What a pass allocates and launches, and which of the tensors it returns."""

    @staticmethod
    def of(inputs: list[torch.Tensor], watch: "Watch", results: Any) -> "Program | None":
        """For a pass that only allocates and launches; None if it cannot be told what is what.

        inputs: Its tensors, which like all others are told by where they begin: views of whole ones
            are the same. watch: What has seen it.
        """
        launched = watch.launched
        places = {x.data_ptr(): i for i, x in enumerate(inputs)}
        if not launched or len(places) < len(inputs) or len({x.device for x in inputs}) > 1:
            return None
        made: list[torch.Tensor] = []
        for x in (x for _, tensors in launched for x in tensors):
            if x is not None and x.data_ptr() not in places:
                places[x.data_ptr()] = len(inputs) + len(made)
                made.append(x)
        returned = []
        for x in [results] if isinstance(results, torch.Tensor) else results:
            if x.numel():
                place = places.get(x.data_ptr(), 0) - len(inputs)
            else:
                place = len(made)
                made.append(x)
            # Filled by a launch, and returned once.
            if place < 0 or place in returned:
                return None
            returned.append(place)
            made[place] = x
        # What it found elsewhere cannot be made.
        allocated = {x.data_ptr() for x in watch.allocated}
        if not all(_whole(x) and x.data_ptr() in allocated for x in made if x.numel()):
            return None
        single = isinstance(results, torch.Tensor)
        return Program(inputs, launched, places, made, returned[0] if single else returned)

    def __init__(
        self,
        inputs: list[torch.Tensor],
        launched: list,
        places: dict[int, int],
        made: list[torch.Tensor],
        returned: int | list[int],
    ) -> None:
        """places: Of pointers. returned: Which of those that are made."""
        from .kernels.launch import Starts

        self.device, self.index = inputs[0].device, inputs[0].get_device()
        self.layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in made]
        self.returned = returned
        # Behind all of them is None, for what is missing.
        nothing = len(inputs) + len(made)
        # No launch is of one tensor, for which itemgetter would make no tuple.
        self.places = [
            itemgetter(*[nothing if x is None else places[x.data_ptr()] for x in tensors])
            for _, tensors in launched
        ]
        presence = [[x is not None for x in tensors] for _, tensors in launched]
        self.starts = Starts([launch for launch, _ in launched], presence)

    def __call__(self, pointers: list[int | None], bits: int) -> Any:
        """What the pass returns; None where it is to be taken itself, as `Starts` says.

        bits: The bitwise or of the pointers of the inputs.
        """
        starts = self.starts.of(self.index, bits)
        if starts is None:
            return None
        device, made = self.device, []
        for shape, stride, dtype in self.layouts:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            made.append(x)
            pointers.append(x.data_ptr())
        pointers.append(None)
        for start, place in zip(starts, self.places, strict=True):
            start(*place(pointers))
        if isinstance(self.returned, int):
            return made[self.returned]
        return tuple([made[i] for i in self.returned])


class Watch(TorchDispatchMode):
    """Sees whether a call only allocates and launches.

    Attributes:
        launched: What it launches, with the tensors.
        allocated: What it allocates, which is kept, so that no two begin at one place.
        pure: Whether that is all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, tuple[torch.Tensor | None, ...]]] = []
        self.allocated: list[torch.Tensor] = []
        self.pure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func not in _HARMLESS:
            self.pure = False
        return result


_UNKNOWN: Any = object()


def served(x: torch.Tensor) -> bool:
    """Whether launches on x can be started by pointers alone."""
    return x.is_cuda


def _first(key: tuple, run: Callable, arguments: tuple) -> Any:
    inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
    if len(_PROGRAMS) >= MOST or not served(inputs[0]):
        return run(*arguments)
    with Watch() as watch:
        results = run(*arguments)
    _PROGRAMS[key] = Program.of(inputs, watch, results) if watch.pure else None
    return results


def _whole(x: torch.Tensor) -> Any:
    """Whether x is all of its memory."""
    return x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.numel() * x.itemsize

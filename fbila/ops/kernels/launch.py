"""Launching a kernel again in a few microseconds: what does not change is worked out once.

A launch through `kernel[grid](...)` looks at every argument anew. Here all but the pointers is in
a `Launch`, made once for given shapes, strides and options, and what Triton compiled is kept.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from triton.runtime.errors import OutOfResources

from ..inlining import launch, traced
from ..replay import Watch


def kernel(function: Callable) -> Any:
    """`triton.jit` that never looks at the value of a number: one binary serves all lengths.

    Numbers are annotated with their type: "i32", "i64" or "fp64".
    """
    numbers = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in ("i32", "i64", "fp64")
    ]
    return triton.jit(do_not_specialize=numbers)(function)


class Launch:
    """A kernel with its grid and all its arguments but the tensors, which come first.

    numbers: the arguments after the tensors. constants: the `tl.constexpr` ones, last and in order.
    options: num_warps and the like. The dtypes of the tensors must follow from what the launch was
    made for.
    """

    def __init__(
        self,
        kernel: Any,
        programs: tuple[int, int],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        # They are passed by position.
        assert kernel.arg_names[-len(constants) :] == list(constants)
        self.kernel = kernel
        self.grid = (*programs, 1)
        self.numbers = numbers
        self.constants = constants
        self.tail = (*numbers, *constants.values())
        self.options = options
        # What Triton compiled, by device, missing tensors and alignment of the others.
        self.compiled: dict[Any, Any] = {}
        # Without a GPU, the dtypes that it was called with, by missing tensors.
        self.dtypes: dict[Any, Any] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        assert len(tensors) + len(self.tail) == len(self.kernel.arg_names)
        first = tensors[0]
        assert first is not None
        if traced(first):
            launch(self.kernel, self.grid, tensors, self.numbers, self.constants, self.options)
            return
        if torch._C._len_torch_dispatch_stack():
            watch = _get_current_dispatch_mode()
            if isinstance(watch, Watch):
                watch.launched.append((self, tensors))
                with _disable_current_modes():
                    self._launch(tensors)
                return
        self._launch(tensors)

    def _launch(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        first = tensors[0]
        assert first is not None
        if not first.is_cuda:
            self._check(tensors)
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
            return
        device = first.get_device()
        if device != torch._C._cuda_getDevice():
            # Triton launches on the current device, which need not be the tensors' own.
            with torch.cuda.device(device):
                self._launch(tensors)
            return
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        # Triton makes use of pointers that are multiples of 16 bytes.
        key = (device, *[None if p is None else p % 16 == 0 for p in pointers])
        start = self.compiled.get(key)
        if start is None:
            self.compiled[key] = self._starter(self._first(tensors), device)
        else:
            start(*pointers)

    def _check(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """What the interpreter would forgive: that what was compiled is for other dtypes."""
        dtypes = [None if x is None else x.dtype for x in tensors]
        there = tuple(dtype is not None for dtype in dtypes)
        before = self.dtypes.setdefault(there, dtypes)
        assert dtypes == before, f"{self.kernel.__name__} is launched for {before}, not {dtypes}"

    def _first(self, tensors: tuple[torch.Tensor | None, ...]) -> Any:
        """Run, and return what Triton compiled.

        Fewer stages of loads, which change no result, where a GPU has too little shared memory.
        """
        for stages in range(self.options["num_stages"], 0, -1):
            options = {**self.options, "num_stages": stages}
            try:
                return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **options)
            except OutOfResources:
                if stages == 1:
                    raise
        raise AssertionError("a launch has one stage at least")

    def _starter(self, compiled: Any, device: int) -> Callable[..., None]:
        """A function of the pointers that calls the driver, not by way of `compiled[grid]`."""
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        grid, tail = self.grid, self.tail
        stream_of = torch._C._cuda_getCurrentRawStream

        def start(*pointers: int | None) -> None:
            # No metadata for hooks, and no hooks on entry and exit.
            run(*grid, stream_of(device), function, metadata, None, None, None, *pointers, *tail)

        return start


class Starts:
    """The launches of a pass, ready to be called with pointers, once each has run as a `Launch`.

    presence: for each launch, which of its tensors are there; all are multiples of 16 bytes.
    """

    def __init__(self, launches: list[Launch], presence: list[list[bool]]) -> None:
        self.launches = launches
        self.presence = [[True if there else None for there in row] for row in presence]
        self.ready: dict[int, list[Callable[..., None]]] = {}

    def of(self, device: int, pointers: int) -> list[Callable[..., None]] | None:
        """On the current device alone, for pointers whose bitwise or is `pointers`."""
        if pointers % 16 or device != torch._C._cuda_getDevice():
            return None
        starts = self.ready.get(device)
        if starts is None:
            starts = [
                launch.compiled.get((device, *row))
                for launch, row in zip(self.launches, self.presence, strict=True)
            ]
            if any(start is None for start in starts):
                return None
            self.ready[device] = starts
        return starts

"""Launching a kernel again in a few microseconds: what does not change is worked out once.

A launch through `kernel[grid](...)` looks at every argument anew. Here all but the pointers is in
a `Launch`, made once for given shapes, strides and options, and what Triton compiled is kept.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton


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
    """

    def __init__(
        self,
        kernel: Any,
        programs: tuple[int, int],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int,
    ) -> None:
        self.kernel = kernel
        self.grid = (*programs, 1)
        self.numbers = numbers
        self.constants = constants
        self.tail = (*numbers, *constants.values())
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.key = (kernel, tuple(constants.items()), num_warps, num_stages)

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        first = tensors[0]
        assert first is not None
        if first.is_cuda:
            index = first.get_device()
            if index != torch._C._cuda_getDevice():
                # Triton launches on the current device, which need not be the tensors' own.
                with torch.cuda.device(index):
                    return self(*tensors)
            # Triton makes use of pointers that are multiples of 16 bytes.
            pointers = tuple(None if x is None else x.data_ptr() for x in tensors)
            known = (
                self.key, index, *((x, p and p % 16 == 0) for x, p in zip(
                    (None if x is None else x.dtype for x in tensors), pointers, strict=True)),
            )  # fmt: skip
            compiled = COMPILED.get(known)
            if compiled is not None:
                stream = torch._C._cuda_getCurrentRawStream(index)
                compiled[self.grid](*pointers, *self.tail, stream=stream)
                return None
            COMPILED[known] = self.kernel[self.grid](
                *tensors, *self.numbers, **self.constants, **self.options
            )
            return None
        self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        return None


# What Triton compiled, by everything that its machine code depends on.
COMPILED: dict[Any, Any] = {}

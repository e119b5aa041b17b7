"""How tensors lie in memory, as the kernels are told."""

import math
from typing import NamedTuple


class Axes(NamedTuple):
    """A `(B, H, N, D)` tensor's shape and strides."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Layout(NamedTuple):
    """Tensors that one kernel reads or writes.

    orders: for each tensor, which axis is contiguous: "head_dim", "tokens" or "any".
    unit: elements that divide every other stride, at most 16 bytes of them.
    strides: all four strides of each tensor in turn, in units (in elements where "any").
    same: whether all tensors step alike from token to token and along the head dim.
    grain: tokens that are there or not together: where they are contiguous, what divides their
        number, at most 16 bytes.
    """

    orders: tuple[str, ...]
    unit: int
    strides: tuple[int, ...]
    same: bool
    grain: int

    @staticmethod
    def of(itemsize: int, *tensors: Axes) -> "Layout":
        # An axis of length 1 may have any stride; it is never stepped along.
        strides = [[s if n > 1 else 0 for s, n in zip(x.stride, x.shape, strict=True)]
                   for x in tensors]  # fmt: skip
        orders = [contiguous_axis(x.shape, own) for x, own in zip(tensors, strides, strict=True)]
        unit = 16 // itemsize
        for order, own in zip(orders, strides, strict=True):
            contiguous = {"head_dim": 3, "tokens": 2, "any": None}[order]
            unit = math.gcd(unit, *(s for i, s in enumerate(own) if i != contiguous))
        return Layout(
            tuple(orders),
            unit,
            tuple(s if order == "any" else s // unit
                  for order, own in zip(orders, strides, strict=True) for s in own),
            all(x.shape[3] == tensors[0].shape[3] and own[2:] == strides[0][2:]
                for x, own in zip(tensors, strides, strict=True)),
            math.gcd(unit, *(x.shape[2] for x in tensors)) if "tokens" in orders else 1,
        )  # fmt: skip


def contiguous_axis(shape: tuple[int, ...], stride: list[int]) -> str:
    if stride[3] == 1 or shape[3] == 1:
        return "head_dim"
    return "tokens" if stride[2] == 1 else "any"

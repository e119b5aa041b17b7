"""How tensors lie in memory, as the kernels are told."""

import math
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """`(B, H, N, D)` tensors that one kernel reads or writes.

    orders: for each tensor, which axis is contiguous: "head_dim", "tokens" or "any".
    unit: elements that divide every other stride, at most 16 bytes of them.
    strides: all four strides of each tensor in turn, in units (in elements where "any").
    """

    orders: tuple[str, ...]
    unit: int
    strides: tuple[int, ...]

    @staticmethod
    def of(*tensors: torch.Tensor) -> "Layout":
        orders, strides = [], []
        # An axis of length 1 may have any stride; it is never stepped along.
        for x in tensors:
            own = [s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True)]
            orders.append("head_dim" if own[3] <= 1 and (x.shape[3] == 1 or own[3] == 1)
                          else "tokens" if own[2] == 1 else "any")  # fmt: skip
            strides.append(own)
        unit = 16 // tensors[0].element_size()
        for order, own in zip(orders, strides, strict=True):
            contiguous = {"head_dim": 3, "tokens": 2, "any": None}[order]
            unit = math.gcd(unit, *(s for i, s in enumerate(own) if i != contiguous))
        return Layout(
            tuple(orders), unit,
            tuple(s if order == "any" else s // unit
                  for order, own in zip(orders, strides, strict=True) for s in own),
        )  # fmt: skip

"""Tensors `(B, C, ...)` of channels at positions, as the kernels see them: NCHW or channels_last.

A tile is `(BLOCK_C, BLOCK_P)` in either; in memory its positions are contiguous, or its channels
where `LAST`. Numbers of channels and of positions are passed in units of `UNIT_C` and `UNIT_P`
elements, at most 16 bytes of them, so that the compiler can prove the alignment that 16-byte
accesses need, also under a mask.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Channels of a tile in channels_last: 128 bytes of a 16-bit type.
_CHANNELS = 64


@triton.jit
def sample_offset(i_b, channels, positions, UNIT_C: tl.constexpr, UNIT_P: tl.constexpr):
    """Elements from a tensor's start to its sample i_b, an int64."""
    return i_b * (channels * UNIT_C) * (positions * UNIT_P)


@triton.jit
def tile_offset(
    o_c, o_p, channels, positions, UNIT_C: tl.constexpr, UNIT_P: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """(BLOCK_C, BLOCK_P) elements from a sample's start, of int64 channels and positions."""
    if LAST:
        return o_c[:, None] + o_p[None, :] * (channels * UNIT_C)
    else:
        return o_c[:, None] * (positions * UNIT_P) + o_p[None, :]


@triton.jit
def inside(o, length, UNIT: tl.constexpr):
    """Which of `o` are before `length` units, told for UNIT of them at a time."""
    return o // UNIT < length


class Planes(NamedTuple):
    """The lengths of a `(B, C, ...)` tensor."""

    samples: int
    channels: int
    positions: int
    itemsize: int

    @staticmethod
    def of(shape: tuple[int, ...], *dtypes: torch.dtype) -> "Planes":
        """For tensors of these dtypes; what is aligned in the narrowest is in the others."""
        itemsize = min(dtype.itemsize for dtype in dtypes)
        return Planes(shape[0], shape[1], math.prod(shape[2:]), itemsize)

    def unit(self, length: int) -> int:
        """Elements that divide a length, at most 16 bytes of them."""
        return math.gcd(16 // self.itemsize, length)

    @property
    def numbers(self) -> tuple[int, int]:
        """`channels` and `positions` of the kernels."""
        return (
            self.channels // self.unit(self.channels),
            self.positions // self.unit(self.positions),
        )

    @property
    def units(self) -> dict[str, int]:
        return {"UNIT_C": self.unit(self.channels), "UNIT_P": self.unit(self.positions)}

    def tile(self, elements: int, *last: bool) -> tuple[int, int]:
        """(BLOCK_C, BLOCK_P) for tensors in these orders: long in memory, square where they differ.

        last: Whether a tensor is in channels_last.
        """
        block_c, block_p = (triton.next_power_of_2(x) for x in (self.channels, self.positions))
        if any(last):
            block_c = min(block_c, _CHANNELS)
            block_p = min(block_p, elements // block_c)
        else:
            block_p = min(block_p, elements)
            block_c = min(block_c, elements // block_p)
        return block_c, block_p

    def blocks(self, block_c: int, block_p: int) -> tuple[int, int]:
        """How many tiles there are along the channels and along the positions."""
        return triton.cdiv(self.channels, block_c), triton.cdiv(self.positions, block_p)


def warps(elements: int, of_a_thread: int = 16) -> int:
    """For a tile; a power of two."""
    return max(1, min(16, elements // (32 * of_a_thread)))

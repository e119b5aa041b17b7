"""How grids of tokens are divided among programs that go down their rows.

A lane is some columns of a grid `(B, H, W, C)`, down which it goes for a chunk of its rows. A
program has a block of channels in several lanes. See `rolling_rows.py`.
"""

import math
from typing import NamedTuple

import triton

from .rolling_rows import split_rows

# The most channels of a program.
BLOCK = 128
# The most and, for the sake of more programs, the fewest rows of a chunk, of which k - 1 more are
# read than written.
ROWS, FEWEST_ROWS = 64, 8


class Lanes(NamedTuple):
    """The constants and the numbers of a kernel."""

    block: int
    lanes: int
    strips: int
    chunks: int
    rows: int
    warps: int

    @staticmethod
    def of(
        shape: tuple[int, ...], pixels: int, of_thread: int, threads: int, least: int
    ) -> "Lanes":
        """For grids `(B, H, W, C)`: columns of a lane, channels and number of threads.

        least: Programs below which rows are divided into chunks of fewer than `ROWS`.
        """
        B, H, W, C = shape
        block = block_of(C)
        strips = triton.cdiv(W, pixels)
        most = triton.next_power_of_2(B * strips * triton.cdiv(H, FEWEST_ROWS))
        lanes = max(1, min(threads * of_thread // block, most))
        programs = triton.cdiv(C, block) * triton.cdiv(B * strips, lanes)
        chunks, rows = split_rows(H, programs, ROWS, FEWEST_ROWS, least)
        warps = max(1, lanes * block // (32 * of_thread))
        return Lanes(block, lanes, strips, chunks, rows, warps)

    def programs(self, shape: tuple[int, ...]) -> int:
        """For all lanes of such grids."""
        B, _, _, C = shape
        return triton.cdiv(C, self.block) * triton.cdiv(B * self.chunks * self.strips, self.lanes)


def block_of(channels: int) -> int:
    """Channels of a program: as many as leave none of them idle, if that is not very few."""
    block = min(BLOCK, triton.next_power_of_2(channels))
    while block > 32 and channels % block:
        block //= 2
    return block


def strides_of(
    shape: tuple[int, ...], stride: tuple[int, ...] | None, itemsize: int
) -> tuple[list[int], int]:
    """Of samples, rows and columns, in units of so many elements, at most 16 bytes of them."""
    if stride is None:
        return [0, 0, 0], 1
    # An axis of length 1 may have any stride; it is never stepped along.
    steps = [s if n > 1 else 0 for s, n in zip(stride[:3], shape[:3], strict=True)]
    unit = math.gcd(16 // itemsize, *steps)
    return [s // unit for s in steps], unit

"""Rotary tables of a picture's grid: half of the pairs of channels turn by row, half by column.

    angle(i, pair p) = row(i) f_p  for the first half of the pairs,  column(i) f_p  for the second

with f falling from 1 to 1 / base. Published layers differ in how it falls, and in whether f runs
once over all channels or once over those of each head; their weights go with their own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Rotary
from ..ops.autograd import ordinary


def axial_rotary(
    height: int,
    width: int,
    dim: int,
    *,
    base: float = 10000.0,
    endpoint: bool = False,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Rotary:
    """Tables `(height * width, dim / 2)` of neighbouring channels, tokens row by row.

    Args:
        height: Rows H of the grid.
        width: Columns W.
        dim: Channels that the frequencies run over; a multiple of 4.
        base: f falls from 1 to about 1 / base.
        endpoint: Of the dim / 4 frequencies the last is 1 / base itself, f_t = base^-(t / (dim / 4
            - 1)) (RALA, MALA). False: one step before it, f_t = base^-(t / (dim / 4)) (MLLA).
        device: Of the tables.
        dtype: Of the tables, and of the computation.

    Returns:
        A `Rotary`, as the operators take it.

    Raises:
        ValueError: If `dim` is no multiple of 4.

    Example:
        >>> axial_rotary(3, 5, 32).cos.shape
        torch.Size([15, 16])
    """
    check_pairs("dim", dim)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    count = dim // 4
    steps = torch.linspace(0, 1, count, **factory) if endpoint else _steps(count, factory)
    frequencies = 1 / base**steps
    rows, columns = (torch.arange(n, **factory)[:, None] * frequencies for n in (height, width))
    angles = torch.cat(
        (
            rows[:, None].expand(height, width, count),
            columns[None].expand(height, width, count),
        ),
        -1,
    ).flatten(0, 1)
    return Rotary(angles.cos(), angles.sin())


def check_pairs(name: str, channels: int) -> None:
    """Pairs of channels, half of them for rows and half for columns."""
    if channels % 4:
        raise ValueError(f"A 2-D rotary embedding needs {name} to be a multiple of 4: {channels}.")


def _steps(count: int, factory: dict[str, Any]) -> Tensor:
    return torch.arange(count, **factory) / count


class AxialRotary(nn.Module):
    """`axial_rotary` for the grids that a layer meets; it keeps the tables of the last one.

    There is nothing to learn or to save: the state dict is empty.

    Args:
        dim: Channels that the frequencies run over.
        num_heads: The heads that `dim` is the channels of, each with its own part of the
            frequencies (MLLA). None: `dim` is the channels of one head, and the tables serve all
            (RALA, MALA).
        base: As in `axial_rotary`.
        endpoint: As in `axial_rotary`.

    Raises:
        ValueError: If `dim` is no multiple of 4, or the heads have no whole pairs.

    Example:
        >>> rope = AxialRotary(64, num_heads=4)
        >>> rope(3, 5, torch.zeros(1)).cos.shape
        torch.Size([4, 15, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        base: float = 10000.0,
        endpoint: bool = False,
    ) -> None:
        super().__init__()
        check_pairs("dim", dim)
        if num_heads is not None and dim % (2 * num_heads):
            raise ValueError(
                f"Heads must have pairs of channels, got dim={dim} and num_heads={num_heads}."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.base = base
        self.endpoint = endpoint
        self._last: tuple[Any, Rotary | None] = (None, None)

    def forward(self, height: int, width: int, like: Tensor) -> Rotary:
        """Tables `(N, dim / 2)`, or `(H, N, dim / 2 / H)` with heads, on the device of `like`.

        They are float32, or float64 for a float64 `like`.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        grid = (height, width, like.device, dtype)
        if not ordinary(like):
            return self._tables(*grid)
        last, tables = self._last
        if tables is None or last != grid:
            # Not of inference mode, so that a later call can differentiate with them.
            with torch.inference_mode(False):
                tables = self._tables(*grid)
            # While a CUDA graph is captured nothing is computed yet.
            if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._last = grid, tables
        return tables

    def _tables(self, height: int, width: int, device: Any, dtype: torch.dtype) -> Rotary:
        cos, sin, order = axial_rotary(
            height,
            width,
            self.dim,
            base=self.base,
            endpoint=self.endpoint,
            device=device,
            dtype=dtype,
        )
        if self.num_heads is None:
            return Rotary(cos, sin, order)
        cos, sin = (x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for x in (cos, sin))
        return Rotary(cos, sin, order)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the tables."""
        return {**self.__dict__, "_last": (None, None)}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, endpoint={self.endpoint}"

"""Softmax attention within windows of a grid, by PyTorch's operations.

A grid `(B, H, W, ...)` is read from `shift` on, around its end, filled up to whole windows below
and to the right, and cut into windows of `window` rows and columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def to_windows(x: Tensor, window: Size, shift: Size, fill: Tensor | None = None) -> Tensor:
    """`(B, H, W, C)` -> `(B, rows of windows, windows in a row, T, C)`.

    fill: `(C,)` of what is beyond the grid; None for zeros.
    """
    B, H, W, C = x.shape
    x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    rows, columns = -H % window[0], -W % window[1]
    if rows or columns:
        beyond = x.new_zeros(C) if fill is None else fill.to(x.dtype)
        x = torch.cat([x, beyond.expand(B, rows, W, C)], 1)
        x = torch.cat([x, beyond.expand(B, H + rows, columns, C)], 2)
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    return x.flatten(3, 4)


def from_windows(x: Tensor, window: Size, shift: Size, size: Sequence[int]) -> Tensor:
    """The grid of `size` that has been cut into windows."""
    x = x.unflatten(3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x[:, : size[0], : size[1]]
    return x.roll(shift, (1, 2)) if any(shift) else x


def pair_numbers(window: Size, device: torch.device) -> Tensor:
    """`(T, T)`: for query and key the row of a table `((2 rows - 1) (2 columns - 1), heads)`."""
    rows, columns = window
    tokens = torch.arange(rows * columns, device=device)
    below = tokens[:, None] // columns - tokens // columns + rows - 1
    right = tokens[:, None] % columns - tokens % columns + columns - 1
    return below * (2 * columns - 1) + right


def shift_mask(down: int, across: int, window: Size, shift: Size, like: Tensor) -> Tensor:
    """`(down, across, 1, T, T)`: -100 for tokens from opposite sides of the grid."""
    rows, columns = (
        (torch.arange(n * w, device=like.device) >= n * w - s).to(like.dtype)
        for n, w, s in zip((down, across), window, shift, strict=True)
    )
    regions = (2 * rows[:, None] + columns)[None, :, :, None]
    region = to_windows(regions, window, (0, 0))[0, :, :, None, :, 0]
    return (region[..., None] != region[..., None, :]).to(like.dtype) * -100


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(..., T, heads d)` -> `(..., heads, T, d)`."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """`(..., heads, T, d)` -> `(..., T, heads d)`."""
    return x.transpose(-2, -3).flatten(-2)


def weights(q: Tensor, k: Tensor, table: Tensor, window: Size, shift: Size) -> Tensor:
    """`(B, rows of windows, windows in a row, heads, T, T)`."""
    heads, T = table.shape[1], window[0] * window[1]
    bias = table[pair_numbers(window, table.device).flatten()].t().reshape(heads, T, T)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias
    if any(shift):
        logits = logits + shift_mask(q.shape[1], q.shape[2], window, shift, logits)
    return logits.softmax(-1)


def window_attention(
    qkv: Tensor,
    table: Tensor,
    fill: Tensor | None,
    window: Size,
    shift: Size,
    drop: float = 0.0,
) -> Tensor:
    """As `fbila::window_attention` of `window_attention_library.py`; drop: of weights."""
    heads = table.shape[1]
    parts = to_windows(qkv, window, shift, fill).chunk(3, -1)
    q, k, v = (split_heads(part, heads) for part in parts)
    p = weights(q, k, table, window, shift)
    o = F.dropout(p, drop) @ v if drop else p @ v
    return from_windows(join_heads(o), window, shift, qkv.shape[1:3])

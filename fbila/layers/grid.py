"""Tokens `(B, N, C)` as the grid of H rows and W columns that they come from, row by row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import without_autocast
from ..ops.depthwise_conv_library import depthwise_conv
from .plain_modules import parameter


def grid_of(tokens: int, H: int | None, W: int | None) -> tuple[int, int]:
    """H and W of a grid of that many tokens; without both it is a square."""
    if H is None and W is None:
        H = W = int(tokens**0.5)
    if H is None or W is None or tokens != H * W:
        raise ValueError(
            f"H and W must be the rows and columns of the tokens, got H={H} and W={W} for {tokens} "
            "tokens; leave both out for a square alone"
        )
    return H, W


def as_pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(rows, columns) of a size of which one number means a square."""
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise ValueError(f"{name} must be positive, got {name}={size}")
    return rows, columns


def as_grid(x: Tensor, H: int, W: int) -> Tensor:
    """`(B, N, C)` -> `(B, C, H, W)`, a view."""
    return x.unflatten(1, (H, W)).permute(0, 3, 1, 2)


def as_tokens(x: Tensor) -> Tensor:
    """`(B, C, H, W)` -> `(B, N, C)`, a view."""
    return x.flatten(2).transpose(1, 2)


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, heads, N, C / heads)`, a view."""
    B, N, C = x.shape
    return x.view(B, N, num_heads, C // num_heads).transpose(1, 2)


def reduced_size(H: int, W: int, sr_ratio: int) -> tuple[int, int]:
    """The grid that a convolution of that stride makes; what it does not fill is left out."""
    if min(H, W) < sr_ratio:
        raise ValueError(
            f"H and W must be at least sr_ratio={sr_ratio}, which they are reduced by; got H={H} "
            f"and W={W}"
        )
    return H // sr_ratio, W // sr_ratio


def resize_positions(table: Tensor, native: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A table `(1, N, C)` learned for the grid `native`, for one of another size.

    Bicubic with antialiasing, in float32 at least, as timm resizes position embeddings.
    """
    if native == size:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    with without_autocast(table):
        rows, columns = (
            _resizing(*lengths, dtype, table.device) for lengths in zip(native, size, strict=True)
        )
        # One axis after the other: of three operands torch.einsum has opt_einsum, where that is
        # installed, choose the order by their sizes, which a compiled graph is then tied to.
        grid = columns.mT @ table.to(dtype).unflatten(1, native)
        grid = rows.mT @ grid.flatten(2)
        return grid.reshape(1, size[0] * size[1], -1).to(table.dtype)


def _resizing(length: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of `length` rows gives to each of `to`, `(length, to)`.

    With it the gradient is a product: that of the interpolation itself is summed in any order on a
    GPU, and cannot be compiled for any size.
    """
    one_each = torch.eye(length, dtype=dtype, device=device)[None, None]
    return F.interpolate(one_each, (length, to), mode="bicubic", antialias=True)[0, 0]


def add_local_mixing(
    out: Tensor, conv: nn.Conv2d, v: Tensor, H: int, W: int, gate: Tensor | None = None
) -> Tensor:
    """out `(B, N, C)` and a depthwise convolution of the values `(B, M, C)` over the grid.

    Where there are fewer values than tokens they are first interpolated along the tokens, as if
    those were not rows of a grid: so it is in FLatten and PolaFormer, whose weights are used to it.

    Args:
        out: What it is added to.
        conv: Of the C / heads channels of one head, whose kernels all heads share.
        v: The values.
        H: Rows.
        W: Columns.
        gate: What the sum is multiplied by, `(B, N, C)`; None for nothing.
    """
    if v.shape[1] != H * W:
        v = F.interpolate(v.transpose(1, 2), size=H * W, mode="linear").transpose(1, 2)
    B, N, C = out.shape
    addend = out.reshape(B, H, W, C)
    gate = None if gate is None else gate.reshape(B, H, W, C)
    weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
    return depthwise_conv(v.reshape(B, H, W, C), weight, bias, addend, gate).view(B, N, C)

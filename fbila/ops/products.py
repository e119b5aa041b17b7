"""Products of tokens and weights where tokens lie in either order, without copies of them.

Tokens are `(B, N, C)` with any distance from one to the next, or `(B, C, N)` seen through its
transpose, as the positions of an NCHW picture are: cuBLAS reads and writes both in place.
"""

import torch
from torch import Tensor

# Channels of a block on the diagonal: narrower groups are multiplied together, since a product
# computes tiles of this width however few channels there are, and waits for memory anyway.
BLOCK = 128
# With fewer tokens a sample, sums over samples are not made apart.
FEWEST_TOKENS = 64


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y `(B, N, O)` with x `(B, N, I)` times matrix `(I, O)`, or `(B, I, O)`, and bias.

    bias: `(O,)`, or `(B, 1, O)`.
    """
    if matrix.dim() == 2:
        if _joins(x) and _joins(y):
            x, y = x.view(1, -1, x.shape[2]), y.view(1, -1, y.shape[2])
        matrix = matrix.expand(len(x), -1, -1)
    if bias is None:
        torch.bmm(x, matrix, out=y)
    else:
        torch.baddbmm(bias.expand(y.shape), x, matrix, out=y)


def _joins(x: Tensor) -> bool:
    """Whether the tokens of all samples are at the same distance."""
    return x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """`(O, I)`, the sum of dy^T x over the tokens of dy `(B, N, O)` and x `(B, N, I)`."""
    (_, N, O), I = dy.shape, x.shape[2]
    if O * I > N * (O + I):
        # The products of samples would be more than what they are of.
        dy, x = dy.reshape(1, -1, O), x.reshape(1, -1, I)
    return torch.bmm(dy.mT, x).sum(0)


def together(groups: int, channels: int) -> int:
    """How many of the groups of so many channels are multiplied together."""
    return max((n for n in range(1, groups + 1) if groups % n == 0 and n * channels <= BLOCK),
               default=1)  # fmt: skip


def multiply_groups(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y `(T, C)` with x `(T, C)` times the matrices of its groups.

    weight: `(C / D, D, D)`, of which the first D is that of x.
    bias: `(C,)`.
    """
    blocks = on_diagonal(weight)
    n, width, _ = blocks.shape
    if bias is not None:
        bias = bias.view(n, 1, width)
    multiply(_in_blocks(x, n), blocks, bias, _in_blocks(y, n))


def _in_blocks(x: Tensor, n: int) -> Tensor:
    """`(T, C)` -> `(n, T, C / n)`, a view."""
    return x.unflatten(1, (n, -1)).transpose(0, 1)


def on_diagonal(weight: Tensor) -> Tensor:
    """`(n, R, R)`, zero but for the matrices `(G, D, D)`, one after the other on the diagonals."""
    G, D, _ = weight.shape
    r = together(G, D)
    if r == 1:
        return weight
    blocks = weight.new_zeros(G // r, r, D, r, D)
    _diagonal(blocks).copy_(weight.unflatten(0, (-1, r)))
    return blocks.view(G // r, r * D, r * D)


def _diagonal(blocks: Tensor) -> Tensor:
    """`(n, r, D, r, D)` -> `(n, r, D, D)`, a view."""
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def weight_gradient_of_groups(dy: Tensor, x: Tensor, channels: int) -> Tensor:
    """`(C / D, D, D)`, sums of dy^T x of each group of D channels, of dy and x `(B, N, C)`."""
    N, C = x.shape[1:]
    D, r = channels, together(C // channels, channels)
    n, width = C // (r * D), r * D
    if N < FEWEST_TOKENS:
        dy, x = (t.flatten(0, 1).unsqueeze(0) for t in (dy, x))
    sums = x.new_empty(n, len(x), width, width)
    for block, dy_block, x_block in zip(sums, dy.split(width, 2), x.split(width, 2), strict=True):
        torch.bmm(dy_block.mT, x_block, out=block)
    found = _diagonal(sums.sum(1).view(n, r, D, r, D))
    return found.reshape(C // D, D, D).contiguous()

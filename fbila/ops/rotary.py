"""Rotary position embedding: a rotation of pairs of channels by angles that come as tables."""

from typing import NamedTuple

import torch


class Rotary(NamedTuple):
    """Tables of a rotation, and which channels make a pair.

        y_a = x_a cos - x_b sin          y_b = x_b cos + x_a sin

    Wherever an operator takes `rotary`, a plain `(cos, sin)` means `Rotary(cos, sin)`. It rotates
    phi(q) and phi(k) in the numerator alone: rotated features may be negative, and a denominator
    made of them could vanish.

    Attributes:
        cos: `(N, K / 2)`, shared by the heads, or `(H, N, K / 2)`; one column a pair. Any of the
            dtypes of q; not learned.
        sin: As `cos`.
        interleaved: Pairs (a, b) are (2i, 2i + 1), as of complex numbers (MLLA, RALA, SANA-Video).
            False: (i, i + K / 2), the two halves of a head (GPT-NeoX, Llama).

    Source: Su et al., "RoFormer", 2021; in the numerator of linear attention, section 3.3.

    Example:
        >>> angles = torch.arange(64)[:, None] / 100 ** torch.linspace(0, 1, 8)
        >>> rotary = Rotary(angles.cos(), angles.sin(), interleaved=False)
        >>> rotate(torch.randn(1, 2, 64, 16), rotary).shape
        torch.Size([1, 2, 64, 16])
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = True


def rotate(x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """`x` `(B, H, N, K)` rotated, in the dtype of x; None leaves it as it is."""
    if rotary is None:
        return x
    cos, sin = rotary.cos.to(x.dtype), rotary.sin.to(x.dtype)
    if rotary.interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

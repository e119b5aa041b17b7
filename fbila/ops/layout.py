"""The memory order of what the operators return."""

import torch


def empty_like_order(x: torch.Tensor, width: int) -> torch.Tensor:
    """An uninitialised `(B, H, N, width)` in the memory order of `x` `(B, H, N, ...)`.

    Token-major `(B, N, H, width)` where x is token-major, so that `o.transpose(1, 2).flatten(2)`
    is a view; `(B, H, width, N)` where x is channels-first, so that `o.mT.flatten(1, 2)` is one;
    head-major otherwise.
    """
    B, H, N = x.shape[:3]
    if is_token_major(x):
        return x.new_empty(B, N, H, width).transpose(1, 2)
    if is_channels_first(x):
        return x.new_empty(B, H, width, N).transpose(2, 3)
    return x.new_empty(B, H, N, width)


def is_token_major(x: torch.Tensor) -> bool:
    """Whether the heads of one token lie closer in memory than the tokens of one head."""
    return x.stride(1) < x.stride(2)


def is_channels_first(x: torch.Tensor) -> bool:
    """Whether the tokens of one channel lie side by side, as the positions of an NCHW picture."""
    return x.stride(2) == 1 < x.stride(3)


def in_order_of(x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """`o` `(B, H, N, V)` in the memory order of `x`, dense: copied only if it differs."""
    if is_token_major(x):
        return o.transpose(1, 2).contiguous().transpose(1, 2)
    if is_channels_first(x):
        return o.transpose(2, 3).contiguous().transpose(2, 3)
    return o.contiguous()

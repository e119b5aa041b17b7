"""The memory order of what the operators return."""

import torch


def empty_like_order(x: torch.Tensor, width: int) -> torch.Tensor:
    """An uninitialised `(B, H, N, width)` in the memory order of `x` `(B, H, N, ...)`.

    Token-major `(B, N, H, width)` where x is token-major, so that `o.transpose(1, 2).flatten(2)`
    is a view; head-major otherwise.
    """
    B, H, N = x.shape[:3]
    if is_token_major(x):
        return x.new_empty(B, N, H, width).transpose(1, 2)
    return x.new_empty(B, H, N, width)


def is_token_major(x: torch.Tensor) -> bool:
    """Whether the heads of one token lie closer in memory than the tokens of one head."""
    return x.stride(1) < x.stride(2)


def in_order_of(x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """`o` `(B, H, N, V)`, contiguous, in the memory order of `x`: copied only if it differs."""
    return o.transpose(1, 2).contiguous().transpose(1, 2) if is_token_major(x) else o.contiguous()

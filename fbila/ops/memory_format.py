"""How tensors `(B, C, ...)` lie in memory: contiguous, or with the channels last."""

import torch


def is_channels_last(x: torch.Tensor) -> bool | None:
    """Whether the channels of x are contiguous; None if it is dense in neither order.

    Of a tensor with one channel, or with one position, both orders hold, and it is False.
    """
    if x.is_contiguous():
        return False
    if x.ndim == 4:
        last = x.is_contiguous(memory_format=torch.channels_last)
    else:
        last = x.movedim(1, -1).is_contiguous()
    return True if last else None


def order_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x `(B, C, H, W)` lies so, contiguous where it does not."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x, copied if it is dense in neither order, and whether it is in channels_last."""
    last = is_channels_last(x)
    return (x.contiguous(), False) if last is None else (x, last)


def empty_in_order(x: torch.Tensor, last: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor like x, in channels_last or contiguous, in x's dtype or another."""
    if is_channels_last(x) is last:
        # Three times as fast as what follows.
        return torch.empty_like(x, dtype=dtype)
    if not last:
        return x.new_empty(x.shape, dtype=dtype)
    shape = x.shape[:1] + x.shape[2:] + x.shape[1:2]
    return x.new_empty(shape, dtype=dtype).movedim(-1, 1)


def beside(
    x: torch.Tensor, shape: tuple[int, ...], *tensors: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """The tensors, contiguous.

    Raises:
        ValueError: If they are not all of this shape, on x's device and of a floating-point dtype.
    """
    for y in tensors:
        if y is not None and (
            y.shape != shape or y.device != x.device or not y.is_floating_point()
        ):
            raise ValueError(
                f"Expected a floating-point tensor of shape {list(shape)} on {x.device}, got "
                f"{list(y.shape)} in {y.dtype} on {y.device}."
            )
    return [None if y is None else y.contiguous() for y in tensors]


def dtypes_of(*tensors: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    """What a kernel that is given the tensors is compiled for."""
    return tuple([None if x is None else x.dtype for x in tensors])

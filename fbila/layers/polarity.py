"""What PolaFormer and PolaFormer++ make of queries and keys before the op splits them by sign.

Both have features g([relu(x), relu(-x)]) with a g for each channel that is 0 at 0. With

    x' = sign(x) g(|x|)

they are the "signed" features of x', which the op makes on the chip: x' is half as wide.
"""

import torch
from torch import Tensor


def restore_sign(magnitude: Tensor, x: Tensor) -> Tensor:
    """`sign(x) * magnitude` in the dtype of x.

    What float16 cannot hold becomes the largest that it can: an infinite feature would make the
    whole row NaN.
    """
    result = torch.copysign(magnitude, x.detach())
    if x.dtype == torch.float16:
        limit = torch.finfo(x.dtype).max
        result = result.clamp(-limit, limit)
    return result.to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """In float32 at least: steep functions would multiply the rounding of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def join_halves(same: Tensor, opposite: Tensor) -> Tensor:
    """`(B, heads, N, V / 2)` of each polarity -> `(B, N, heads * V)`."""
    # One copy: the op has no way to write into a part of a head.
    return torch.cat((same.transpose(1, 2), opposite.transpose(1, 2)), -1).flatten(2)

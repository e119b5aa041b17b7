"""What PolaFormer and PolaFormer++ make of queries and keys before the op splits them by sign.

Both have features g([relu(x), relu(-x)]) with a g for each channel that is 0 at 0. With

    x' = sign(x) g(|x|)

they are the "signed" features of x', which the op makes on the chip: x' is half as wide.
`signed_map` makes x', and that of the other polarity.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """In float32 at least: steep functions would multiply the rounding of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def join_halves(same: Tensor, opposite: Tensor) -> Tensor:
    """`(B, heads, N, V / 2)` of each polarity -> `(B, N, heads * V)`."""
    # One copy: the op has no way to write into a part of a head.
    return torch.cat((same.transpose(1, 2), opposite.transpose(1, 2)), -1).flatten(2)

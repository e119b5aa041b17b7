"""The gradient of `fbila::group_norm` by x, as a torch.library op.

`fbila::group_norm_backward`: dy, x `(B, C, ...)`, shift `(B, C)`, x_bias, weight and bias `(C,)`,
and the mean and 1 / deviation of each group, `(2, B, groups)` -> dx, as x lies in memory. The
formula is in `kernels/group_norm_backward.py`. A kernel on CUDA, PyTorch elsewhere.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Union

import torch

from .autograd import refuse_second_derivative
from .group_sizes import is_short
from .library import LIBRARY, sum_dtype
from .memory_format import dense, dtypes_of, empty_in_order, is_channels_last

if TYPE_CHECKING:
    from .kernels.group_norm_backward import GroupNormBackward
    from .kernels.short_group_norm_backward import ShortGroupNormBackward

LIBRARY.define(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? shift, Tensor? x_bias, Tensor weight, "
    "Tensor bias, Tensor statistics, bool silu) -> Tensor"
)


@lru_cache(maxsize=1024)
def planned(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    dtype_y: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    last: bool,
    last_y: bool,
    groups: int,
    silu: bool,
) -> Union["GroupNormBackward", "ShortGroupNormBackward"]:
    """others: dtypes of shift, biases and weight, which kernels are compiled for as well."""
    from .kernels.group_norm_backward import GroupNormBackward
    from .kernels.short_group_norm_backward import ShortGroupNormBackward

    plan = ShortGroupNormBackward if is_short(shape, groups) else GroupNormBackward
    return plan(shape, dtype, dtype_y, last, last_y, groups, silu)


def in_kernel(dy, x, shift, x_bias, weight, bias, statistics, silu):
    shift, x_bias, weight, bias = (
        None if t is None else t.contiguous() for t in (shift, x_bias, weight, bias)
    )
    x, last = dense(x)
    dy, last_y = dense(dy)
    dx = empty_in_order(x, last)
    if dx.numel():
        others = dtypes_of(shift, x_bias, weight, bias)
        groups = statistics.shape[-1]
        run = planned(x.shape, x.dtype, dy.dtype, others, last, last_y, groups, silu)
        run(x, dy, shift, x_bias, weight, bias, statistics, dx)
    return dx


def in_pytorch(dy, x, shift, x_bias, weight, bias, statistics, silu):
    wide, ones = sum_dtype(x), [1] * (x.ndim - 2)
    groups = statistics.shape[-1]

    def grouped(t):
        return t.reshape(len(x), groups, -1)

    z = x.to(wide)
    if shift is not None:
        z = z + shift.reshape(*shift.shape, *ones)
    if x_bias is not None:
        z = z + x_bias.view(-1, *ones)
    mean, inverse = statistics.unsqueeze(-1)
    h = ((grouped(z) - mean) * inverse).view(x.shape)
    g = dy.to(wide) * weight.view(-1, *ones)
    if silu:
        u = h * weight.view(-1, *ones) + bias.view(-1, *ones)
        s = u.sigmoid()
        g = g * s * (1 + u * (1 - s))
    h, g = grouped(h), grouped(g)
    dx = (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)) * inverse
    return empty_like_x(dy, x).copy_(dx.view(x.shape))


def empty_like_x(dy, x, *others):
    return empty_in_order(x, is_channels_last(x) is True)


LIBRARY.impl("group_norm_backward", in_kernel, "CUDA")
LIBRARY.impl("group_norm_backward", in_pytorch, "CPU")
torch.library.register_fake("fbila::group_norm_backward", empty_like_x, lib=LIBRARY)
refuse_second_derivative("group_norm_backward", "group_norm", "Use PyTorch's own for that.")

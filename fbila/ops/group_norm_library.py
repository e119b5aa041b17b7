"""GroupNorm, with what is added before it and SiLU behind it, as a torch.library op for inference.

`fbila::group_norm`: x `(B, C, ...)`, shift `(B, C)`, x_bias, weight and bias `(C,)`

    y = [SiLU](GroupNorm(x + shift + x_bias))

x may be NCHW or channels_last, and is read in place; y lies in memory as x does, or in
channels_last where that is asked for, in x's dtype or another. A kernel on CUDA, PyTorch elsewhere.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F

from .autograd import ordinary
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dense, dtypes_of, empty_in_order, is_channels_last

if TYPE_CHECKING:
    from .kernels.group_norm import GroupNorm
    from .kernels.short_group_norm import ShortGroupNorm

LIBRARY.define(
    "group_norm(Tensor x, Tensor? shift, Tensor? x_bias, Tensor weight, Tensor bias, int groups, "
    "float eps, bool silu, bool channels_last, ScalarType? dtype=None) -> Tensor"
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
    eps: float,
    silu: bool,
) -> Union["GroupNorm", "ShortGroupNorm"]:
    """others: dtypes of shift, biases and weight, which kernels are compiled for as well."""
    from .kernels.channels import Planes
    from .kernels.group_norm import GroupNorm
    from .kernels.short_group_norm import LONGEST, ShortGroupNorm

    planes = Planes.of(shape, dtype)
    # The size of the batch must not enter.
    short = planes.channels // groups * planes.positions <= LONGEST
    plan = ShortGroupNorm if short else GroupNorm
    return plan(shape, dtype, dtype_y, last, last_y, groups, eps, silu)


def in_kernel(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    B, C = x.shape[:2]
    if C % groups:
        raise ValueError(f"groups must divide the channels, got {groups} and {C}.")
    (shift,) = beside(x, (B, C), shift)
    x_bias, weight, bias = beside(x, (C,), x_bias, weight, bias)
    x, last = dense(x)
    last_y = last or channels_last
    y = empty_in_order(x, last_y, dtype)
    if y.numel():
        others = dtypes_of(shift, x_bias, weight, bias)
        run = planned(x.shape, x.dtype, y.dtype, others, last, last_y, groups, eps, silu)
        run(x, shift, x_bias, weight, bias, y)
    return y


def group_norm_(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """The kernel of `group_norm` in the memory of x, for dense x that needs no dispatcher.

    It reads what it writes over in the same launch, and each element once.
    """
    last = is_channels_last(x)
    assert last is not None
    weight, bias = weight.contiguous(), bias.contiguous()
    others = dtypes_of(None, None, weight, bias)
    run = planned(x.shape, x.dtype, x.dtype, others, last, last, groups, eps, silu)
    run(x, None, None, weight, bias, x)
    return x


def in_pytorch(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    wide = sum_dtype(x)
    over = (1, -1, *[1] * (x.ndim - 2))
    z = x.to(wide)
    if shift is not None:
        z = z + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    if x_bias is not None:
        z = z + x_bias.view(over)
    grouped = z.reshape(len(x), groups, -1)
    normed = F.layer_norm(grouped, grouped.shape[-1:], eps=eps).view(x.shape)
    normed = normed * weight.view(over) + bias.view(over)
    y = empty_in_order(x, channels_last or is_channels_last(x) is True, dtype)
    return y.copy_(F.silu(normed) if silu else normed)


LIBRARY.impl("group_norm", in_kernel, "CUDA")
LIBRARY.impl("group_norm", in_pytorch, "CPU")


@torch.library.register_fake("fbila::group_norm", lib=LIBRARY)
def _(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    return empty_in_order(x, channels_last or is_channels_last(x) is True, dtype)


def group_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`fbila::group_norm`, straight away where nothing stands in between."""
    run = in_kernel if x.is_cuda and ordinary(x) else torch.ops.fbila.group_norm
    return run(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype)

"""GroupNorm, with what is added before it and SiLU behind it, as a torch.library op.

`fbila::group_norm`: x `(B, C, ...)`, shift `(B, C)`, x_bias, weight and bias `(C,)`

    y = [SiLU](GroupNorm(x + shift + x_bias))

x may be NCHW or channels_last, and is read in place; y lies in memory as x does, or in
channels_last where that is asked for, in x's dtype or another. A kernel on CUDA, PyTorch elsewhere.

It has gradients of x and shift; weights and biases must be frozen. Kept for them are the inputs and
two numbers a group, its mean and 1 / deviation.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F

from . import group_norm_backward_library as gradient
from .autograd import differentiable_by, direct, needs_gradient, require_frozen
from .group_sizes import is_short
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dense, dtypes_of, empty_in_order, is_channels_last

if TYPE_CHECKING:
    from .kernels.group_norm import GroupNorm
    from .kernels.short_group_norm import ShortGroupNorm

_ARGUMENTS = (
    "Tensor x, Tensor? shift, Tensor? x_bias, Tensor weight, Tensor bias, int groups, float eps, "
    "bool silu, bool channels_last, ScalarType? dtype=None"
)
LIBRARY.define(f"group_norm({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"group_norm_forward({_ARGUMENTS}) -> (Tensor, Tensor)")


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
    from .kernels.group_norm import GroupNorm
    from .kernels.short_group_norm import ShortGroupNorm

    plan = ShortGroupNorm if is_short(shape, groups) else GroupNorm
    return plan(shape, dtype, dtype_y, last, last_y, groups, eps, silu)


def in_kernel(
    x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None, statistics=None
):
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
        run(x, shift, x_bias, weight, bias, y, statistics)
    return y


def forward_in_kernel(x, shift, x_bias, weight, bias, groups, *options):
    statistics = empty_statistics(x, groups)
    y = in_kernel(x, shift, x_bias, weight, bias, groups, *options, statistics=statistics)
    return y, statistics


def empty_statistics(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.new_empty((2, len(x), groups), dtype=sum_dtype(x))


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


def in_pytorch(*arguments):
    return forward_in_pytorch(*arguments)[0]


def forward_in_pytorch(
    x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None
):
    wide = sum_dtype(x)
    over = (1, -1, *[1] * (x.ndim - 2))
    z = x.to(wide)
    if shift is not None:
        z = z + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    if x_bias is not None:
        z = z + x_bias.view(over)
    grouped = z.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    normed = F.layer_norm(grouped, grouped.shape[-1:], eps=eps).view(x.shape)
    normed = normed * weight.view(over) + bias.view(over)
    y = empty_in_order(x, channels_last or is_channels_last(x) is True, dtype)
    y.copy_(F.silu(normed) if silu else normed)
    return y, torch.stack((mean, (variance + eps).rsqrt()))


class GroupNormFunction(torch.autograd.Function):
    """`fbila::group_norm` and its gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        tensors, silu = inputs[:5], inputs[7]
        if direct(*tensors):
            y, statistics = forward_in_kernel(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, statistics = torch.ops.fbila.group_norm_forward(*inputs)
        ctx.save_for_backward(*tensors, statistics)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, shift, *rest = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, x, shift, *rest)
        run = gradient.in_kernel if unseen else torch.ops.fbila.group_norm_backward
        dx = run(dy, x, shift, *rest, ctx.silu)
        need_x, need_shift = ctx.needs_input_grad[:2]
        dshift = None
        if need_shift:
            over = tuple(range(2, x.ndim))
            dshift = (dx.sum(over, dtype=sum_dtype(x)) if over else dx).to(shift.dtype)
        return dx if need_x else None, dshift, *[None] * 8


def differentiable(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    require_frozen("group_norm", x_bias, weight, bias)
    return GroupNormFunction.apply(
        x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype
    )


LIBRARY.impl("group_norm", in_kernel, "CUDA")
LIBRARY.impl("group_norm", in_pytorch, "CPU")
differentiable_by("group_norm", differentiable, in_kernel)
LIBRARY.impl("group_norm_forward", forward_in_kernel, "CUDA")
LIBRARY.impl("group_norm_forward", forward_in_pytorch, "CPU")


@torch.library.register_fake("fbila::group_norm", lib=LIBRARY)
def _(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    return empty_in_order(x, channels_last or is_channels_last(x) is True, dtype)


@torch.library.register_fake("fbila::group_norm_forward", lib=LIBRARY)
def _(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype=None):
    y = empty_in_order(x, channels_last or is_channels_last(x) is True, dtype)
    return y, empty_statistics(x, groups)


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
    run: Callable[..., torch.Tensor] = torch.ops.fbila.group_norm
    if direct(x, shift):
        run = differentiable if needs_gradient(x, shift, x_bias, weight, bias) else in_kernel
    return run(x, shift, x_bias, weight, bias, groups, eps, silu, channels_last, dtype)

"""The end of a residual block as a torch.library op.

`fbila::add_bias`: x + residual + x_bias + residual_bias, of x and residual `(B, C, ...)` and biases
`(C,)` that convolutions have left out. Each may be NCHW or channels_last, and the result lies in
memory as residual does. Its dtype is the wider one of theirs. A kernel on CUDA, PyTorch elsewhere.

It has gradients of x and residual, which are that of the result; biases must be frozen.
"""

from collections.abc import Callable

import torch

from .autograd import differentiable_by, direct, needs_gradient, require_frozen
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dense, dtypes_of, empty_in_order, is_channels_last

LIBRARY.define(
    "add_bias(Tensor x, Tensor residual, Tensor? x_bias, Tensor? residual_bias) -> Tensor"
)


def in_kernel(x, residual, x_bias, residual_bias):
    from .kernels.add_bias import plan_add_bias

    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"x and residual must be alike, got {list(x.shape)} on {x.device} and "
            f"{list(residual.shape)} on {residual.device}."
        )
    x_bias, residual_bias = beside(x, x.shape[1:2], x_bias, residual_bias)
    x, last_x = dense(x)
    residual, last = dense(residual)
    y = empty_in_order(residual, last, torch.promote_types(x.dtype, residual.dtype))
    if y.numel():
        dtypes, of_biases = dtypes_of(x, residual, y), dtypes_of(x_bias, residual_bias)
        launch = plan_add_bias(x.shape, dtypes, of_biases, last_x, last)
        launch(x, residual, x_bias, residual_bias, y)
    return y


def in_pytorch(x, residual, x_bias, residual_bias):
    y = empty_like_sum(x, residual)
    total = x.to(sum_dtype(y)) + residual
    for bias in (x_bias, residual_bias):
        if bias is not None:
            total = total + bias.view(-1, *[1] * (x.ndim - 2))
    return y.copy_(total)


def empty_like_sum(x, residual, x_bias=None, residual_bias=None):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return empty_in_order(residual, is_channels_last(residual) is True, dtype)


class AddBias(torch.autograd.Function):
    """`fbila::add_bias` and its gradient."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.order = [(t.dtype, is_channels_last(t) is True) for t in tensors[:2]]
        if direct(*tensors):
            return in_kernel(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.add_bias(*tensors)

    @staticmethod
    def backward(ctx, dy):
        gradients = [
            in_order(dy, *order) if needed else None
            for order, needed in zip(ctx.order, ctx.needs_input_grad[:2], strict=True)
        ]
        return *gradients, None, None


def in_order(dy: torch.Tensor, dtype: torch.dtype, last: bool) -> torch.Tensor:
    """dy in this dtype, in channels_last or contiguous; itself where it is so."""
    if is_channels_last(dy) is last:
        return dy.to(dtype)
    return empty_in_order(dy, last, dtype).copy_(dy)


def differentiable(x, residual, x_bias, residual_bias):
    require_frozen("add_bias", x_bias, residual_bias)
    return AddBias.apply(x, residual, x_bias, residual_bias)


LIBRARY.impl("add_bias", in_kernel, "CUDA")
LIBRARY.impl("add_bias", in_pytorch, "CPU")
differentiable_by("add_bias", differentiable, in_kernel)
torch.library.register_fake("fbila::add_bias", empty_like_sum, lib=LIBRARY)


def add_bias(
    x: torch.Tensor,
    residual: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fbila::add_bias`, straight away where nothing stands in between."""
    run: Callable[..., torch.Tensor] = torch.ops.fbila.add_bias
    if direct(x, residual):
        run = differentiable if needs_gradient(x, residual, x_bias, residual_bias) else in_kernel
    return run(x, residual, x_bias, residual_bias)

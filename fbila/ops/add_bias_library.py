"""The end of a residual block as a torch.library op, for inference.

`fbila::add_bias`: x + residual + x_bias + residual_bias, of x and residual `(B, C, ...)` and biases
`(C,)` that convolutions have left out. Each may be NCHW or channels_last, and the result lies in
memory as residual does. Its dtype is the wider one of theirs. A kernel on CUDA, PyTorch elsewhere.
"""

import torch

from .autograd import ordinary
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


LIBRARY.impl("add_bias", in_kernel, "CUDA")
LIBRARY.impl("add_bias", in_pytorch, "CPU")
torch.library.register_fake("fbila::add_bias", empty_like_sum, lib=LIBRARY)


def add_bias(
    x: torch.Tensor,
    residual: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fbila::add_bias`, straight away where nothing stands in between."""
    run = in_kernel if x.is_cuda and ordinary(x, residual) else torch.ops.fbila.add_bias
    return run(x, residual, x_bias, residual_bias)

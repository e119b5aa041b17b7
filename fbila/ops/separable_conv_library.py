"""A depthwise and a grouped pointwise convolution as one torch.library op.

`fbila::separable_conv2d`: x `(B, C, H, W)`, depthwise `(C, 1, k, k)` with an odd k, pointwise
`(C, D, 1, 1)`, biases `(C,)`

    y = pointwise * (depthwise * x)             the padding keeps H and W, and D divides C

as multi-scale linear attention aggregates neighbouring tokens. x may be NCHW or channels_last, and
is read in place where its channels or its rows are contiguous; y is dense in the same order. A
kernel on CUDA, PyTorch's convolutions elsewhere and where a gradient is wanted.
"""

import torch
import torch.nn.functional as F

from .autograd import differentiable_by, direct, needs_gradient
from .library import LIBRARY
from .memory_format import empty_in_order, is_channels_last

# The most channels of a group that one program multiplies.
MAX_GROUP = 64

LIBRARY.define(
    "separable_conv2d(Tensor x, Tensor depthwise, Tensor? depthwise_bias, Tensor pointwise, "
    "Tensor? pointwise_bias) -> Tensor"
)


def in_kernel(x, depthwise, depthwise_bias, pointwise, pointwise_bias):
    y = empty_in_order(x, has_channels_last(x))
    fill(y, x, depthwise, depthwise_bias, pointwise, pointwise_bias)
    return y


def fill(y, x, depthwise, depthwise_bias, pointwise, pointwise_bias):
    """`in_kernel` whose result is y: x's shape, and dense in its order but for the batch."""
    from .kernels.separable_conv import plan_separable_conv

    check(x, depthwise, depthwise_bias, pointwise, pointwise_bias)
    D, k = pointwise.shape[1], depthwise.shape[-1]
    last = has_channels_last(x)
    if not last and x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    if not y.numel():
        return
    biases = [b if b is None else b.contiguous() for b in (depthwise_bias, pointwise_bias)]
    run = plan_separable_conv(x.shape, x.stride(), x.dtype, last, D, k, y.stride(0))
    run(x, depthwise.contiguous(), biases[0], pointwise.contiguous(), biases[1], y)


def check(x, depthwise, depthwise_bias, pointwise, pointwise_bias):
    """Raises ValueError for what the kernel would read wrongly."""
    C, D, k = x.shape[1], pointwise.shape[1], depthwise.shape[-1]
    if depthwise.shape != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(
            f"depthwise must be ({C}, 1, k, k) with an odd k, got {list(depthwise.shape)}."
        )
    if pointwise.shape != (C, D, 1, 1) or not 0 < D <= MAX_GROUP or C % D:
        raise ValueError(
            f"pointwise must be ({C}, D, 1, 1), where D is at most {MAX_GROUP} and divides {C}, "
            f"got {list(pointwise.shape)}."
        )
    for weight in (depthwise, depthwise_bias, pointwise, pointwise_bias):
        if weight is None:
            continue
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"Weights must be {x.dtype} on {x.device} as x is, got {weight.dtype} on "
                f"{weight.device}."
            )
        if weight.ndim == 1 and len(weight) != C:
            raise ValueError(f"Biases must have {C} elements, got {len(weight)}.")


def in_pytorch(x, depthwise, depthwise_bias, pointwise, pointwise_bias):
    y = empty_in_order(x, has_channels_last(x))
    return y.copy_(convolutions(x, depthwise, depthwise_bias, pointwise, pointwise_bias))


def convolutions(x, depthwise, depthwise_bias, pointwise, pointwise_bias):
    C, k = x.shape[1], depthwise.shape[-1]
    z = F.conv2d(x, depthwise, depthwise_bias, padding=k // 2, groups=C)
    return F.conv2d(z, pointwise, pointwise_bias, groups=C // pointwise.shape[1])


def has_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of x are contiguous, and those of y will be; x need not be dense."""
    last = is_channels_last(x)
    return x.stride(1) == 1 and x.shape[1] > 1 if last is None else last


def differentiable(*tensors):
    if needs_gradient(*tensors) or torch.autograd.forward_ad._current_level >= 0:
        return convolutions(*tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fbila.separable_conv2d(*tensors)


LIBRARY.impl("separable_conv2d", in_kernel, "CUDA")
LIBRARY.impl("separable_conv2d", in_pytorch, "CPU")
differentiable_by("separable_conv2d", differentiable, in_kernel)


@torch.library.register_fake("fbila::separable_conv2d", lib=LIBRARY)
def _(x, *weights):
    return empty_in_order(x, has_channels_last(x))


def separable_conv2d(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    pointwise: torch.Tensor,
    pointwise_bias: torch.Tensor | None,
) -> torch.Tensor:
    """`fbila::separable_conv2d`, straight away where nothing stands in between."""
    tensors = (x, depthwise, depthwise_bias, pointwise, pointwise_bias)
    if direct(*tensors) and not needs_gradient(*tensors):
        return in_kernel(*tensors)
    return torch.ops.fbila.separable_conv2d(*tensors)


def separable_conv2d_into(
    y: torch.Tensor,
    x: torch.Tensor,
    depthwise: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    pointwise: torch.Tensor,
    pointwise_bias: torch.Tensor | None,
) -> None:
    """`separable_conv2d` into y, which may be channels of a larger picture.

    For callers who know that the kernel can be launched: `direct`, and no gradient is wanted.

    Args:
        y: `(B, C, H, W)`, x's dtype and order. Its samples are dense, and may lie further apart.

    Raises:
        ValueError: If y is of another form, or a weight is.
    """
    last = has_channels_last(x)
    # Without its samples' distance; an axis of length 1 may have any stride.
    dense = y[:1].is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device or not dense:
        order = "channels_last" if last else "contiguous"
        raise ValueError(
            f"y must be as x, {list(x.shape)} of {x.dtype} on {x.device}, in {order} samples, got "
            f"{list(y.shape)} of {y.dtype} on {y.device} with strides {y.stride()}."
        )
    fill(y, x, depthwise, depthwise_bias, pointwise, pointwise_bias)

"""The middle of a gated convolutional feed-forward layer as a torch.library op.

    u = dwconv(SiLU(h)) + bias,   y = a SiLU(g),   u = [a, g]

`fbila::gated_depthwise_conv`: h `(B, H, W, 2 C)`, weight `(2 C, 1, 3, 3)` and bias `(2 C,)` or None
of the depthwise convolution, which has zeros around its input -> `(B, H, W, C)`. As in `GLUMBConv`
of Sana, whose 1 x 1 convolutions are in front of it and behind it. It is differentiable by all
three, of which alone it keeps anything. A kernel on CUDA, PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F

from . import gated_conv_backward_library as backward_library
from .autocast import without_autocast
from .autograd import differentiable_by, direct, needs_gradient
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dtypes_of

LIBRARY.define("gated_depthwise_conv(Tensor h, Tensor weight, Tensor? bias) -> Tensor")


def empty_half(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if h.ndim != 4 or h.shape[3] % 2:
        raise ValueError(f"h must be (B, H, W, 2 C), got {list(h.shape)}.")
    beside(h, (h.shape[3], 1, 3, 3), weight)
    beside(h, h.shape[3:], bias)
    return h.new_empty((*h.shape[:3], h.shape[3] // 2))


def in_kernel(h, weight, bias):
    from .kernels.gated_conv import plan_gated_conv

    y = empty_half(h, weight, bias)
    if y.numel():
        # Neighbouring channels have to be neighbours, as they are in h.
        taps = weight.flatten(1).t().contiguous()
        bias = None if bias is None else bias.contiguous()
        others = dtypes_of(taps, bias, None)
        plan_gated_conv(y.shape, h.dtype, others)(h.contiguous(), taps, bias, None, y)
    return y


def in_pytorch(h, weight, bias):
    y = empty_half(h, weight, bias)
    if not y.numel():
        return y
    wide = sum_dtype(h)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    picture = F.silu(h.to(wide)).permute(0, 3, 1, 2)
    with without_autocast(h):
        a, g = F.conv2d(picture, weight, bias, padding=1, groups=h.shape[3]).chunk(2, 1)
    return y.copy_((a * F.silu(g)).permute(0, 2, 3, 1))


class GatedDepthwiseConv(torch.autograd.Function):
    """`fbila::gated_depthwise_conv` and its gradients."""

    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight, bias)
        if direct(h, weight, bias):
            return in_kernel(h, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.gated_depthwise_conv(h, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
        run = (
            backward_library.in_kernel if unseen else torch.ops.fbila.gated_depthwise_conv_backward
        )
        gradients = run(dy, *tensors, needed)
        return tuple([x if want else None for x, want in zip(gradients, needed, strict=True)])


LIBRARY.impl("gated_depthwise_conv", in_kernel, "CUDA")
LIBRARY.impl("gated_depthwise_conv", in_pytorch, "CPU")
differentiable_by("gated_depthwise_conv", GatedDepthwiseConv.apply, in_kernel)
torch.library.register_fake("fbila::gated_depthwise_conv", empty_half, lib=LIBRARY)


def gated_depthwise_conv(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`fbila::gated_depthwise_conv`, straight away where nothing stands in between."""
    if not direct(h):
        return torch.ops.fbila.gated_depthwise_conv(h, weight, bias)
    run = GatedDepthwiseConv.apply if needs_gradient(h, weight, bias) else in_kernel
    return run(h, weight, bias)

"""The gradients of `fbila::gated_depthwise_conv`, as a torch.library op.

`fbila::gated_depthwise_conv_backward`: dy `(B, H, W, C)`, h `(B, H, W, 2 C)`, weight
`(2 C, 1, 3, 3)`, bias `(2 C,)` or None, and of which of the last three a gradient is wanted -> dh,
dweight and dbias, as h, weight and bias; those that nobody wants are empty. The formulas are in
`kernels/gated_conv.py` and `kernels/gated_conv_backward.py`. Beside the results it needs the
gradient of the convolution's output, as large as h, for as long as it runs. A kernel on CUDA,
PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F

from .autocast import without_autocast
from .autograd import refuse_second_derivative
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of

LIBRARY.define(
    "gated_depthwise_conv_backward(Tensor dy, Tensor h, Tensor weight, Tensor? bias, "
    "bool[3] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def empty_gradients(dy, h, weight, bias, needs_grad):
    return tuple(
        [
            x.new_empty(x.shape) if needed and x is not None else h.new_empty(0)
            for x, needed in zip((h, weight, bias), needs_grad, strict=True)
        ]
    )


def in_kernel(dy, h, weight, bias, needs_grad):
    from .kernels.gated_conv import plan_gated_conv
    from .kernels.gated_conv_backward import plan_gated_conv_backward

    gradients = empty_gradients(dy, h, weight, bias, needs_grad)
    if not h.numel():
        return tuple([x.zero_() for x in gradients])
    dh, dweight, dbias = (x if x.numel() else None for x in gradients)
    h, dy = h.contiguous(), dy.contiguous()
    taps = weight.flatten(1).t().contiguous()
    bias = None if bias is None else bias.contiguous()
    du = torch.empty_like(h)
    plan_gated_conv(dy.shape, h.dtype, dtypes_of(taps, bias, dy))(h, taps, bias, dy, du)
    launch, add_up, shape = plan_gated_conv_backward(
        h.shape, h.dtype, taps.dtype, dtypes_of(dweight, dbias)
    )
    sums = None if add_up is None else h.new_empty(shape, dtype=sum_dtype(h))
    launch(h, du, taps, dh, sums)
    if add_up is not None:
        add_up(sums, dweight, dbias)
    return gradients


def in_pytorch(dy, h, weight, bias, needs_grad):
    wide = sum_dtype(h)
    gradients = empty_gradients(dy, h, weight, bias, needs_grad)
    if not h.numel():
        return tuple([x.zero_() for x in gradients])
    picture, dy = (x.to(wide).permute(0, 3, 1, 2) for x in (h, dy))
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    with without_autocast(h):
        s = F.silu(picture)
        a, g = F.conv2d(s, weight, bias, padding=1, groups=h.shape[3]).chunk(2, 1)
        du = torch.cat((dy * F.silu(g), dy * a * slope(g)), 1)
        one, mask = [1, 1], [needs_grad[0], needs_grad[1], needs_grad[2] and bias is not None]
        ds, dweight, dbias = torch.ops.aten.convolution_backward(
            du, s, weight, [h.shape[3]], one, one, one, False, [0, 0], h.shape[3], mask
        )
    dh = None if ds is None else (ds * slope(picture)).permute(0, 2, 3, 1)
    for gradient, found in zip(gradients, (dh, dweight, dbias), strict=True):
        # Some of PyTorch's convolutions make more than they are asked for.
        if gradient.numel():
            gradient.copy_(found)
    return gradients


def slope(x: torch.Tensor) -> torch.Tensor:
    """SiLU's derivative."""
    p = x.sigmoid()
    return p + F.silu(x) * (1 - p)


LIBRARY.impl("gated_depthwise_conv_backward", in_kernel, "CUDA")
LIBRARY.impl("gated_depthwise_conv_backward", in_pytorch, "CPU")
torch.library.register_fake("fbila::gated_depthwise_conv_backward", empty_gradients, lib=LIBRARY)
refuse_second_derivative(
    "gated_depthwise_conv_backward", "gated_depthwise_conv", "Use PyTorch's own for that."
)

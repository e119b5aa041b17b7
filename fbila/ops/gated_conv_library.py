"""The middle of a gated convolutional feed-forward layer as a torch.library op, for inference.

    u = dwconv(SiLU(h)) + bias,   y = a SiLU(g),   u = [a, g]

`fbila::gated_depthwise_conv`: h `(B, H, W, 2 C)`, weight `(2 C, 1, 3, 3)` and bias `(2 C,)` or None
of the depthwise convolution, which has zeros around its input -> `(B, H, W, C)`. As in `GLUMBConv`
of Sana, whose 1 x 1 convolutions are in front of it and behind it. A kernel on CUDA, PyTorch
elsewhere.
"""

import torch
import torch.nn.functional as F

from .autograd import direct
from .inference import inference_only, require_no_gradient
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
        plan_gated_conv(y.shape, h.dtype, dtypes_of(taps, bias))(h.contiguous(), taps, bias, y)
    return y


def in_pytorch(h, weight, bias):
    y = empty_half(h, weight, bias)
    if not y.numel():
        return y
    wide = sum_dtype(h)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    picture = F.silu(h.to(wide)).permute(0, 3, 1, 2)
    a, g = F.conv2d(picture, weight, bias, padding=1, groups=h.shape[3]).chunk(2, 1)
    return y.copy_((a * F.silu(g)).permute(0, 2, 3, 1))


LIBRARY.impl("gated_depthwise_conv", in_kernel, "CUDA")
LIBRARY.impl("gated_depthwise_conv", in_pytorch, "CPU")
inference_only("gated_depthwise_conv")
torch.library.register_fake("fbila::gated_depthwise_conv", empty_half, lib=LIBRARY)


def gated_depthwise_conv(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`fbila::gated_depthwise_conv`, straight away where nothing stands in between."""
    if not direct(h):
        return torch.ops.fbila.gated_depthwise_conv(h, weight, bias)
    require_no_gradient("gated_depthwise_conv", h, weight, bias)
    return in_kernel(h, weight, bias)

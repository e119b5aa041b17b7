"""All scales of multi-scale linear attention side by side in one picture, for inference.

    t = [W x, W_1 dwconv_1(W x), W_2 dwconv_2(W x), ...]        (B, scales * C, height, width)

Each scale is written where attention reads it, which then takes all of them at once. In small
pictures joining the scales, and attending to each by itself, takes longer than what is computed.
"""

import torch
from torch import Tensor, nn

from ...ops.autograd import direct, needs_gradient
from ...ops.separable_conv_library import separable_conv2d_into
from ..kernel_checks import read_by_maps
from .aggregation import Weights, fits, weights_of

# Not float32: that a convolution may round to TF32 does not mean that a product may.
_DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def scales_of(
    x: Tensor, weight: Tensor, aggregations: nn.ModuleList, kind: type[nn.Module]
) -> list[Weights] | None:
    """The weights of `aggregations`, each a `kind` of two convolutions, for `in_one_picture`.

    None where that does not stand for a 1 x 1 convolution of x by `weight` `(C, channels of x, 1,
    1)`, and for them: for another form, dtype or order of x, or where a gradient is wanted, a graph
    is made, or a module has a hook.
    """
    if not direct(x, weight):
        return None
    if x.dtype not in _DTYPES or read_by_maps(x) != x.dtype or not fits(weight, x):
        return None
    if x.dim() != 4 or not x.is_contiguous() or not x.numel() or x.shape[1] != weight.shape[1]:
        return None
    scales: list[Weights] = []
    for aggregation in aggregations._modules.values():
        weights = weights_of(aggregation, kind, x, weight.shape[0])
        if weights is None or needs_gradient(*weights):
            return None
        scales.append(weights)
    return None if needs_gradient(x, weight) else scales


def in_one_picture(x: Tensor, weight: Tensor, scales: list[Weights]) -> Tensor:
    """t of contiguous x `(B, channels, height, width)` and what `scales_of` gave; contiguous."""
    B, inner, height, width = x.shape
    C, N = weight.shape[0], height * width
    together = x.new_empty(B, (1 + len(scales)) * C, height, width)
    first, *others = together.chunk(1 + len(scales), 1)
    # The same weight for every sample.
    weights = weight.as_strided((B, C, inner), (0, inner, 1), weight.storage_offset())
    torch.bmm(weights, x.view(B, inner, N), out=first.view(B, C, N))
    for part, scale in zip(others, scales, strict=True):
        separable_conv2d_into(part, first, *scale)
    return together

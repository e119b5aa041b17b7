"""Pictures and weights for the separable convolution, and what is right, in float64."""

import pytest
import torch
from helpers import DEVICE

from fbila.ops.separable_conv_library import convolutions

FORMATS = (torch.contiguous_format, torch.channels_last)
each_format = pytest.mark.parametrize("order", FORMATS, ids=["nchw", "channels_last"])


def draw(shape, D, k, dtype, *, biases=(True, True), order=torch.contiguous_format):
    """x `(B, C, H, W)`, both weights, and a bias behind each where it is wanted."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes, scale=1.0):
        x = torch.randn(sizes, generator=generator, dtype=torch.float64, device=DEVICE)
        return (scale * x).to(dtype)

    C = shape[1]
    depthwise, pointwise = normal(C, 1, k, k, scale=1 / k), normal(C, D, 1, 1, scale=D**-0.5)
    first, second = (normal(C) if there else None for there in biases)
    return normal(*shape).contiguous(memory_format=order), depthwise, first, pointwise, second


def exact(*tensors):
    return convolutions(*(t if t is None else t.double() for t in tensors))


def assert_near(actual, expected):
    """Both convolutions round to the dtype, and sums of float32 in between."""
    bound = (2 if actual.dtype.itemsize == 2 else 8) * torch.finfo(actual.dtype).eps
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)

"""Convolutions over some rows of a picture at a time, for `low_memory`.

A library of convolutions may copy all of its input and output into another layout, which for the
widest layers of a UNet is more than all that the UNet itself holds.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.memory_format import order_of

# Elements of input and output that are processed at a time.
ELEMENTS = 2**26


def by_rows(conv: nn.Module) -> bool:
    """Whether `convolve` computes what this module does."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        # Every row of the output sees one of the input.
        and conv.padding[0] < _extent(conv, 0)
    )


def convolve(conv: nn.Conv2d, x: Tensor, times: int = 1) -> Tensor:
    """`conv(x)`; with `times`, of x with every pixel repeated so often in both directions.

    Args:
        conv: Of which `by_rows` is true.
        x: `(B, C, H, W)`.
        times: A whole number.
    """
    height, width = x.shape[2] * times, x.shape[3] * times
    rows, columns = _outputs(conv, 0, height), _outputs(conv, 1, width)
    width_in, width_out = conv.in_channels * width, conv.out_channels * columns
    at_once = max(1, ELEMENTS // (len(x) * (conv.stride[0] * width_in + width_out)))
    if at_once >= rows:
        return conv._conv_forward(_enlarged(x, times), conv.weight, conv.bias)
    y = None
    for first in range(0, rows, at_once):
        last = min(first + at_once, rows)
        piece = _input_of(conv, x, times, first, last)
        piece = F.conv2d(piece, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
        if y is None:
            # In the dtype that autocast chooses, and in the order that the library does.
            y = torch.empty(
                (*piece.shape[:2], rows, columns),
                dtype=piece.dtype,
                device=piece.device,
                memory_format=order_of(piece),
            )
        y[:, :, first:last] = piece
    assert y is not None
    return y


def _outputs(conv: nn.Conv2d, i: int, size: int) -> int:
    return (size + 2 * _padding(conv)[i] - _extent(conv, i)) // conv.stride[i] + 1


def _extent(conv: nn.Conv2d, i: int) -> int:
    """Of the input that one pixel of the output sees."""
    return conv.dilation[i] * (conv.kernel_size[i] - 1) + 1


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    return int(conv.padding[0]), int(conv.padding[1])


def _input_of(conv: nn.Conv2d, x: Tensor, times: int, first: int, last: int) -> Tensor:
    """What the rows from `first` to before `last` of the output are computed from, padded."""
    padding, columns = _padding(conv)
    top = first * conv.stride[0] - padding
    bottom = (last - 1) * conv.stride[0] - padding + _extent(conv, 0)
    begin, end = max(top, 0), min(bottom, x.shape[2] * times)
    source = begin // times
    piece = _enlarged(x[:, :, source : -(-end // times)], times)
    piece = piece[:, :, begin - source * times : end - source * times]
    return F.pad(piece, (columns, columns, begin - top, bottom - end))


def _enlarged(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else F.interpolate(x, scale_factor=times, mode="nearest")


def upsample_forward(upsample: Any, x: Tensor, output_size: Any = None) -> Tensor:
    """`Upsample2D.forward`; the enlarged picture is never there as a whole."""
    plain = upsample.interpolate and upsample.use_conv and not upsample.use_conv_transpose
    if output_size is not None or not plain or upsample.norm is not None:
        return type(upsample).forward(upsample, x, output_size)
    conv = upsample.conv if upsample.name == "conv" else upsample.Conv2d_0
    return convolve(conv, x, 2) if by_rows(conv) else type(upsample).forward(upsample, x)

"""Under autocast a depthwise convolution and what is around it are as wide as PyTorch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fbila.ops.depthwise_conv_library import depthwise_conv


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def autocast(request):
    """Of CUDA, which `torch.autocast` leaves alone where there is none; its dtype."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", request.param)
    yield request.param
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("dtypes", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
], ids=str)  # fmt: skip
def test_under_autocast_the_result_is_as_wide_as_pytorchs(autocast, dtypes):
    kinds = (None, torch.float16, torch.float32)
    with FakeTensorMode():
        for options in itertools.product((False, True), repeat=3):
            for kind_a, kind_g in itertools.product(kinds, kinds):
                x, weight, addend, gate = (
                    None if dtype is None else torch.empty(shape, device="cuda", dtype=dtype)
                    for shape, dtype in zip(
                        ((2, 5, 7, 6), (6, 1, 3, 3), (2, 5, 7, 6), (2, 5, 7, 6)),
                        (*dtypes, kind_a, kind_g),
                        strict=True,
                    )
                )
                named = dict(zip(("residual", "gelu", "silu"), options, strict=True))
                y = depthwise_conv(x, weight, None, addend, gate, **named)
                f = F.gelu(x) if named["gelu"] else x
                expected = F.conv2d(f.permute(0, 3, 1, 2), weight, padding=1, groups=6).dtype
                for other in (x if named["residual"] else None, addend, gate):
                    if other is not None:
                        expected = torch.promote_types(expected, other.dtype)
                assert y.dtype == expected

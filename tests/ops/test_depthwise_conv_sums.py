"""How gradients of a depthwise convolution's taps are divided among programs, on any grid."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

from fbila.ops.depthwise_conv_library import backward_in_kernel
from fbila.ops.kernels.depthwise_conv_sums import (
    PROGRAMS,
    PROGRAMS_GELU,
    plan_depthwise_conv_sums,
)

# (B, H, W, C) of published models' layers, from their first stage to their last.
LAYERS = [
    (64, 128, 128, 64), (64, 56, 56, 224), (64, 28, 28, 128), (64, 14, 14, 320), (64, 14, 14, 1120),
    (64, 7, 7, 512), (64, 7, 7, 1792), (1, 56, 56, 96),
]  # fmt: skip


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("own_taps", [False, True])
@pytest.mark.parametrize("shape", [(37, 7, 7, 16), (19, 16, 9, 8), (5, 2, 17, 48), (6, 1, 3, 8)])
def test_samples_share_programs(shape, own_taps, side, gelu):
    B, H, W, C = shape
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    taps = torch.randn(B * C if own_taps else C, 1, side, side, generator=generator).double()
    leaves = taps.requires_grad_(), torch.zeros(len(taps), dtype=torch.float64, requires_grad=True)
    each = [t.repeat(B * C // len(t), *[1] * (t.dim() - 1)) for t in leaves]
    picture = (F.gelu(x) if gelu else x).permute(0, 3, 1, 2).reshape(1, B * C, H, W)
    y = F.conv2d(picture, *each, padding=side // 2, groups=B * C).view(B, C, H, W)
    expected = torch.autograd.grad(y, leaves, dy.permute(0, 3, 1, 2))
    tensors = (t.detach().to(DEVICE, torch.float32) for t in (dy, x, *leaves))
    found = backward_in_kernel(*tensors, False, gelu, False, [False, True, True])[1:]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_programs_run_at_once_and_have_alike_to_do(shape, side, gelu):
    B, H, W, C = shape
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    stride = (H * W * C, W * C, C, 1)
    launch, _, (parts, *_) = plan_depthwise_conv_sums(shape, stride, stride, side, C, dtypes, gelu)
    strips, chunks, rows, lanes, works, given = launch.numbers[-6:]
    assert given == parts
    programs = PROGRAMS_GELU if gelu else PROGRAMS
    assert launch.grid[0] <= programs and (parts == works or 2 * launch.grid[0] > programs)
    # All rows of all samples, and no lane without any but in the last program.
    assert (chunks - 1) * rows < H <= chunks * rows
    assert lanes == B * strips * chunks
    assert 0 <= works * launch.constants["LANES"] - lanes < launch.constants["LANES"]
    # As many for each program, if not one fewer.
    most = -(-works // parts)
    assert (most - 1) * parts < works

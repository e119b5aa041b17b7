"""LayerNorm with LeakyReLU in one kernel, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.kernels.norm import launch_norm
from fbila.ops.norm_library import layer_norm_leaky_relu


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 1, 1), (2, 5, 80), (3, 2, 1280)], ids=str)
@pytest.mark.parametrize("launch", [launch_norm, layer_norm_leaky_relu])
def test_of_part_of_a_wider_tensor(launch, shape, dtype):
    P, R, D = shape
    torch.manual_seed(0)
    wide = 3 + 2 * torch.randn(R, P * D + 7, dtype=torch.float64, device=DEVICE).to(dtype)
    x = wide[:, : P * D].unflatten(1, (P, D)).transpose(0, 1)
    weight, bias = torch.randn(2, P, D, dtype=torch.float64, device=DEVICE).to(dtype)
    actual = launch(x, weight, bias, 1e-5, 0.01)
    assert actual.is_contiguous() and actual.dtype == dtype
    for i in range(P):
        normed = F.layer_norm(x[i].double(), (D,), weight[i].double(), bias[i].double(), 1e-5)
        expected = F.leaky_relu(normed, 0.01)
        # Where the variance is small, cancellation in the mean counts.
        bound = 2 * torch.finfo(dtype).eps * (expected.abs().max() + 1)
        if dtype == torch.float32:
            bound *= 4
        if dtype == torch.float64:
            bound *= 8
        assert (actual[i].double() - expected).abs().max() <= bound


def test_nothing_in_nothing_out():
    x = torch.randn(2, 0, 16, device=DEVICE)
    weight = torch.randn(2, 16, device=DEVICE)
    assert layer_norm_leaky_relu(x, weight, weight, 1e-5, 0.01).shape == (2, 0, 16)


def test_opcheck():
    x = torch.randn(2, 5, 16, device=DEVICE)
    weight = torch.randn(2, 16, device=DEVICE)
    op = torch.ops.fbila.layer_norm_leaky_relu.default
    torch.library.opcheck(op, (x, weight, weight, 1e-5, 0.01))

"""fbila's LayerNorm is PyTorch's, with or without its kernel."""

import pytest
import torch
from helpers import CUDA, DEVICE, DTYPES
from torch import nn

from fbila.layers import layer_norm
from fbila.layers.layer_norm import LayerNorm


@pytest.fixture
def seen(monkeypatch):
    """Widths that went to the kernel."""
    widths: list[int] = []
    original = layer_norm.layer_norm

    def watched(x, *others):
        widths.append(x.shape[-1])
        return original(x, *others)

    monkeypatch.setattr(layer_norm, "layer_norm", watched)
    return widths


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@torch.no_grad()
def test_inference(options, dtype, seen):
    ours = LayerNorm(96, eps=1e-3, **options).to(DEVICE, dtype)
    if options == {}:
        nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    x = 3 + torch.randn(2, 5, 96, device=DEVICE).to(dtype)
    expected = nn.LayerNorm.forward(ours.double(), x.double())
    y = ours.to(dtype)(x)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=8 * eps)
    assert seen == ([96] if CUDA and "elementwise_affine" not in options else [])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_where_the_kernel_is_not(seen):
    x = torch.randn(4, 8, device="cuda")
    ours = LayerNorm(8).cuda()
    ours(x)
    with torch.no_grad():
        with torch.autocast("cuda", torch.bfloat16):
            ours(x)
        ours(x.half().float().expand(2, 4, 8).double().float())
        LayerNorm((4, 8)).cuda()(x)
        assert seen == [8]
        with pytest.raises(RuntimeError):
            ours(x[:, :4])


def test_training():
    ours, x = LayerNorm(8).to(DEVICE, torch.float64), torch.randn(4, 8, device=DEVICE).double()
    torch.autograd.gradcheck(ours, x.requires_grad_())
    ours(x).sum().backward()
    assert ours.weight.grad is not None and ours.bias.grad is not None

"""Convolutions of the vision layers are PyTorch's own, whatever is added, in either order."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import nn

from fbila.layers.depthwise_conv import DepthwiseConv2d
from fbila.layers.over_tokens import over_tokens
from fbila.layers.pointwise_conv import PointwiseConv2d

FORMATS = (torch.contiguous_format, torch.channels_last)
each_format = pytest.mark.parametrize("order", FORMATS, ids=str)


def picture(order, C=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, C, 5, 7, generator=generator, dtype=torch.float64)
    return x.to(DEVICE).contiguous(memory_format=order)


def assert_it_is(ours, stock, x, call):
    stock.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for module in (ours, stock):
        leaf = x.detach().requires_grad_()
        y = call(module, leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
    torch.testing.assert_close(*results, check_stride=False)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last) == (x.stride(1) == 1)


@each_format
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("gelu, silu", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("added", ["nothing", "itself", "another"])
@pytest.mark.parametrize("gated", [False, True])
def test_depthwise(gated, added, gelu, silu, side, order):
    def call(module, x):
        addend = picture(order, seed=1) if added == "another" else None
        gate = picture(order, seed=2) if gated else None
        if type(module) is DepthwiseConv2d:
            return module(x, addend, gate, residual=added == "itself", gelu=gelu, silu=silu)
        x = F.gelu(x) if gelu else x
        addend = x if added == "itself" else addend
        y = module(x) if addend is None else addend + module(x)
        y = F.silu(y) if silu else y
        return y * gate if gated else y

    kwargs = {"device": DEVICE, "dtype": torch.float64}
    stock = nn.Conv2d(6, 6, side, padding=side // 2, groups=6, **kwargs)
    assert_it_is(DepthwiseConv2d(6, side, **kwargs), stock, picture(order), call)


@each_format
def test_pointwise(order):
    kwargs = {"device": DEVICE, "dtype": torch.float64}
    ours, stock = PointwiseConv2d(6, 10, **kwargs), nn.Conv2d(6, 10, 1, **kwargs)
    assert_it_is(ours, stock, picture(order), lambda module, x: module(x))


def test_pictures_without_a_batch():
    x = picture(torch.contiguous_format)[0]
    for module in (DepthwiseConv2d(6, 3), PointwiseConv2d(6, 4)):
        module.to(DEVICE, torch.float64)
        torch.testing.assert_close(module(x), nn.Conv2d.forward(module, x))


def test_autocast_casts_the_picture_alone():
    module = DepthwiseConv2d(6, 3, device=DEVICE)
    x = picture(torch.channels_last).float()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        expected = x + nn.Conv2d.forward(module, x)
        for y in (module(x, x), module(x, residual=True)):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=2e-2)
        for y in (module(x, x, x), module(x, gate=x, residual=True)):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected * x, rtol=1e-2, atol=5e-2)


@each_format
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "stock"])
def test_over_tokens(kind, order):
    kwargs = {"device": DEVICE, "dtype": torch.float64}
    module, options = nn.Conv2d(6, 4, 3, padding=1, **kwargs), {}
    others = []
    if kind == "depthwise":
        module, options = DepthwiseConv2d(6, 3, **kwargs), {"residual": True, "silu": True}
        others = [None, picture(order, seed=1)]
    elif kind == "pointwise":
        module = PointwiseConv2d(6, 4, **kwargs)
    x = picture(order).requires_grad_()
    expected = module(x, *others, **options)
    gate = [None if t is None else t.permute(0, 2, 3, 1) for t in others]
    found = over_tokens(module, x.permute(0, 2, 3, 1), *gate, **options).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
    )


@pytest.mark.parametrize("kind", [DepthwiseConv2d, PointwiseConv2d])
def test_over_tokens_calls_what_has_a_hook_or_another_forward(kind, monkeypatch):
    module = kind(6, 3) if kind is DepthwiseConv2d else kind(6, 6)
    x, seen = torch.randn(2, 5, 7, 6), []
    handle = module.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    over_tokens(module, x)
    assert seen == [(2, 6, 5, 7)]
    handle.remove()
    over_tokens(module, x)
    assert len(seen) == 1
    of_all = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        over_tokens(module, x)
    finally:
        of_all.remove()
    assert seen[1:] == [module]
    module.forward = lambda x: 0 * x
    assert not over_tokens(module, x).any()
    del module.forward
    assert over_tokens(module, x).any()
    monkeypatch.setattr(kind, "forward", lambda self, x: 0 * x)
    assert not over_tokens(module, x).any()


@pytest.mark.skipif(DEVICE == "cpu", reason="kernels")
def test_under_autocast_what_is_added_to_a_wide_picture_is_as_exact():
    conv = DepthwiseConv2d(16, 3, device=DEVICE)
    exact = DepthwiseConv2d(16, 3, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(conv.state_dict())
    results = []
    for module, dtype in ((conv, torch.float32), (exact, torch.float64)):
        leaf = picture(torch.channels_last, C=16).to(dtype).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = module(leaf, residual=True)
        assert y.dtype == dtype
        found = [y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])]
        results.append([t.double() for t in found])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

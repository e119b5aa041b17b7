"""VSSD's layer is its formula on any grid, and has the official parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA, DEVICE
from torch import nn
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_factory,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
)

from fbila.layers import NonCausalSSD, vssd
from fbila.layers.layer_norm import LayerNorm
from fbila.ops import gated_norm_library

# dim 32, 4 heads: 64 channels of values, 16 of q and of k.
SHAPES = {
    "in_proj.weight": (64 + 64 + 16 + 16 + 4, 32),
    "conv2d.weight": (96, 1, 3, 3),
    "conv2d.bias": (96,),
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "norm.weight": (64,),
    "norm.bias": (64,),
    "out_proj.weight": (32, 64),
}


def make(dim: int = 32, heads: int = 4, **settings) -> NonCausalSSD:
    torch.manual_seed(0)
    return NonCausalSSD(dim, heads, **{"d_state": 16, **settings})


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, h: int, w: int, *, heads: int):
    """The published formula, head by head and with an explicit (N, N) matrix."""
    b, dim = x.shape[0], x.shape[2]
    states = (p["conv2d.weight"].shape[0] - 2 * dim) // 2
    z, u, dt = (x @ p["in_proj.weight"].T).split((2 * dim, 2 * dim + 2 * states, heads), -1)
    picture = u.transpose(1, 2).reshape(b, -1, h, w)
    weight = p["conv2d.weight"]
    u = F.conv2d(picture, weight, p["conv2d.bias"], padding=1, groups=weight.shape[0])
    u = (u * u.sigmoid()).flatten(2).transpose(1, 2)
    v, k, q = u.split((2 * dim, states, states), -1)
    step = torch.log1p(torch.exp(dt + p["dt_bias"]))
    scores = q @ k.transpose(1, 2)
    outs = []
    for head, values in enumerate(v.chunk(heads, -1)):
        gain = step[..., head] * p["A_log"][head].exp()
        outs.append((scores * gain[:, None]) @ values + p["D"][head] * values)
    o = torch.cat(outs, -1)
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return ((o * p["norm.weight"] + p["norm.bias"]) * z) @ p["out_proj.weight"].T


@pytest.mark.parametrize(
    ("dim", "heads", "states", "h", "w"),
    [(32, 4, 16, 5, 7), (24, 3, 5, 4, 4), (20, 2, 8, 1, 3), (32, 2, 64, 9, 6)],
)
def test_formula(dim, heads, states, h, w):
    layer = make(dim, heads, d_state=states)
    assert_formula(layer, by_hand, torch.randn(2, h * w, dim), h, w, heads=heads)


def test_names_and_shapes():
    assert {n: tuple(p.shape) for n, p in make().state_dict().items()} == SHAPES
    biased = make(bias=True, conv_bias=False).state_dict()
    assert set(biased) - set(SHAPES) == {"in_proj.bias", "out_proj.bias"}
    assert set(SHAPES) - set(biased) == {"conv2d.bias"}


def test_a_square_needs_no_size():
    layer, x = make(), torch.randn(1, 9, 32)
    assert torch.equal(layer(x), layer(x, 3, 3))


def test_how_it_begins():
    layer = make(512, 256)
    step, rate = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert step.min() >= 1e-3 and step.max() <= 0.1
    assert abs(step.log().mean() - math.log(1e-2)) < 0.3
    assert rate.min() >= 1 and rate.max() <= 16 and abs(rate.mean() - 8.5) < 1
    assert (layer.D == 1).all()


def test_one_query_and_key_serve_all_heads_in_place(monkeypatch):
    layer = make()
    capture = Capture(vssd.simple_la)
    monkeypatch.setattr(vssd, "simple_la", capture)
    layer(torch.randn(2, 15, 32), 3, 5)
    q, k, v = capture.inputs
    assert q.stride(1) == k.stride(1) == 0
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
    assert capture.output.transpose(1, 2).flatten(2)._is_view()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(4, 168), (8, 168), (2, 168)])
def test_rows_of_the_projection_are_aligned(heads, width, bias, monkeypatch):
    layer, x = make(heads=heads, bias=bias), torch.randn(2, 15, 32)
    parts = layer.project(x)
    assert [t.shape[-1] for t in parts] == [64, 96, heads]
    for t in parts:
        assert t.stride() == (15 * width, width, 1) and t.storage_offset() % 8 == 0
    torch.testing.assert_close(torch.cat(parts, -1), layer.in_proj(x))
    # What reads it takes it as it lies.
    seen = Capture(layer.conv2d.forward)
    monkeypatch.setattr(layer.conv2d, "forward", seen)
    layer(x, 3, 5)
    (u,) = seen.inputs
    assert u.stride() == (15 * width, 1, 5 * width, width)


def test_a_projection_that_does_more_is_called():
    layer, x = make(), torch.randn(2, 15, 32)
    expected = layer(x, 3, 5)
    calls: list[nn.Module] = []
    layer.in_proj.register_forward_hook(lambda module, _inputs, _y: calls.append(module))
    torch.testing.assert_close(layer(x, 3, 5), expected)
    assert calls == [layer.in_proj]
    layer = make()
    layer.in_proj = nn.Sequential(layer.in_proj)
    torch.testing.assert_close(layer(x, 3, 5), expected)


def test_device_and_dtype_reach_every_parameter():
    assert_factory(make)


def test_serves():
    assert_serves(make(), torch.randn(2, 15, 32), 3, 5)


def test_compiles():
    assert_compiles(make(), (torch.randn(2, 15, 32), 3, 5), (torch.randn(2, 28, 32), 4, 7))


@pytest.mark.parametrize("autocast", [False, True])
def test_norm_and_gate_are_one_kernel(autocast, monkeypatch):
    """It reads what it is given in place; gradients are those of the operations one by one."""
    layer, x = make().to(DEVICE), torch.randn(2, 15, 32, device=DEVICE, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def run():
        with torch.autocast(DEVICE, torch.float16, enabled=autocast):
            y = layer(x, 3, 5)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    with monkeypatch.context() as patched:
        patched.setattr(vssd, "direct", lambda *_: False)
        expected = run()
    if not CUDA:
        for module in (vssd, gated_norm_library):
            monkeypatch.setattr(module, "direct", lambda *_: True)
    capture = Capture(vssd.gated_norm)
    monkeypatch.setattr(vssd, "gated_norm", capture)
    actual = run()
    o, v, z = (t for t in capture.inputs[:3])
    assert [t.stride() for t in (o, v, z)] == [
        (15 * width, width, 1) for width in (64, 64 + 2 * 16, 168)
    ]
    assert v._is_view() and z._is_view()
    if autocast:
        assert {t.dtype for t in (o, v, z, capture.output)} == {torch.float16}
    for ours, theirs in zip(actual, expected, strict=True):
        scale = theirs.abs().max().item()
        atol = (1e-2 if autocast else 1e-5) * scale
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_another_norm_is_called_as_it_is(options, monkeypatch):
    layer, x = make().to(DEVICE), torch.randn(2, 15, 32, device=DEVICE)
    layer.norm = LayerNorm(layer.d_inner, device=DEVICE, **options)
    monkeypatch.setattr(vssd, "direct", lambda *_: True)
    called = []
    layer.norm.register_forward_pre_hook(lambda *_: called.append(True))
    expected = layer(x, 3, 5)
    assert called
    layer.norm._forward_pre_hooks.clear()
    torch.testing.assert_close(layer(x, 3, 5), expected)


def test_kernels(monkeypatch):
    assert_kernels_agree(monkeypatch, make(), torch.randn(1, 15, 32), 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "num_heads must divide dim, got dim=64 and num_heads=5"),
        ({"d_conv": 4}, "kernel_size must be odd"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_the_grid_must_hold_the_tokens():
    with pytest.raises(ValueError, match="got H=3 and W=4 for 15 tokens"):
        make()(torch.randn(1, 15, 32), 3, 4)


class Unpadded(torch.Tensor):
    """A weight that can be multiplied by and nothing else, as quantised ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch._C._nn.pad or function is F.pad:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_a_kind_of_their_own():
    layer, x = NonCausalSSD(16, num_heads=2), torch.randn(2, 12, 16)
    expected = layer(x, 3, 4)
    layer.in_proj.weight = nn.Parameter(layer.in_proj.weight.detach().as_subclass(Unpadded))
    actual = layer(x, 3, 4).as_subclass(torch.Tensor)
    torch.testing.assert_close(actual, expected)

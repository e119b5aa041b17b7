"""LiteMLA is its formula on pictures of any size and order, and timm's layer with its weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_factory,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
    memory_of,
    randomize,
)

from fbila.layers import LiteMLA, lite_mla

# 32 channels, heads of 16: 2 on each scale.
SHAPES = {
    "qkv.conv.weight": (96, 32, 1, 1),
    "aggreg.0.0.weight": (96, 1, 5, 5),
    "aggreg.0.1.weight": (96, 16, 1, 1),
    "proj.conv.weight": (32, 64, 1, 1),
    "proj.norm.weight": (32,),
    "proj.norm.bias": (32,),
    "proj.norm.running_mean": (32,),
    "proj.norm.running_var": (32,),
    "proj.norm.num_batches_tracked": (),
}


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, *, dim: int, scales: tuple[int, ...]):
    """The published formula, with an explicit (N, N) matrix; the norm as it begins."""
    b, _, h, w = x.shape
    t = F.conv2d(x, p["qkv.conv.weight"], p.get("qkv.conv.bias"))
    wide = t.shape[1]
    parts = [t]
    for s, scale in enumerate(scales):
        names = [f"aggreg.{s}.{i}" for i in range(2)]
        (near, near_bias), (mix, mix_bias) = ((p[f"{n}.weight"], p.get(f"{n}.bias")) for n in names)
        local = F.conv2d(t, near, near_bias, padding=scale // 2, groups=wide)
        parts.append(F.conv2d(local, mix, mix_bias, groups=wide // dim))
    q, k, v = torch.cat(parts, 1).reshape(b, -1, 3, dim, h * w).unbind(2)
    scores = torch.einsum("bhdi,bhdj->bhij", q.relu(), k.relu())
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-15)
    o = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(b, -1, h, w)
    y = F.conv2d(o, p["proj.conv.weight"], p.get("proj.conv.bias"))
    if "proj.norm.weight" not in p:
        return y
    y = y / (1 + 1e-5) ** 0.5
    return y * p["proj.norm.weight"][:, None, None] + p["proj.norm.bias"][:, None, None]


@pytest.mark.parametrize(
    ("settings", "h", "w"),
    [
        ({"dim": 16}, 5, 7),
        ({"dim": 8, "scales": ()}, 4, 4),
        ({"dim": 16, "scales": (3, 5), "use_bias": True, "norm_layer": None}, 1, 3),
        ({"dim": 16, "heads_ratio": 2.0, "out_channels": 24}, 9, 6),
        ({"heads": 3}, 2, 2),
    ],
    ids=str,
)
def test_formula(settings, h, w):
    torch.manual_seed(0)
    layer = LiteMLA(32, **settings).eval()
    hand = {"dim": settings.get("dim", 8), "scales": settings.get("scales", (5,))}
    assert_formula(layer, by_hand, torch.randn(2, 32, h, w), **hand)


def test_channels_last():
    torch.manual_seed(0)
    layer = LiteMLA(32, dim=16).eval()
    x = torch.randn(2, 32, 5, 7).to(memory_format=torch.channels_last)
    assert_formula(layer, by_hand, x, dim=16, scales=(5,))


def test_names_and_shapes():
    layer = LiteMLA(32, dim=16)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == SHAPES


@pytest.mark.parametrize(("dim", "scales", "ratio"), [(16, (5,), 1.0), (8, (), 0.5)])
def test_timm_computes_the_same(dim, scales, ratio):
    module = pytest.importorskip("timm.models.efficientvit_mit")
    settings = {"dim": dim, "scales": scales, "heads_ratio": ratio}
    theirs = randomize(module.LiteMLA(32, 32, **settings)).eval()
    ours = LiteMLA(32, eps=1e-5, **settings).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_norm_learns_while_training():
    layer = LiteMLA(32, dim=16)
    layer(torch.randn(2, 32, 3, 5))
    assert layer.proj.norm.running_mean.any() and layer.proj.norm.num_batches_tracked == 1


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied_on_the_way(monkeypatch, order):
    layer = LiteMLA(32, dim=16).to(memory_format=order)
    written = []
    for convolution in (layer.qkv, layer.aggreg[0]):
        convolution.register_forward_hook(lambda _, __, out: written.append(memory_of(out)))
    captures = []

    def linear_attn(*inputs, **options):
        captures.append(Capture(operator))
        return captures[-1](*inputs, **options)

    operator = lite_mla.linear_attn
    monkeypatch.setattr(lite_mla, "linear_attn", linear_attn)
    layer(torch.randn(2, 32, 3, 5).to(memory_format=order))
    for capture, storage in zip(captures, (written[0], written[1]), strict=True):
        assert {memory_of(t) for t in capture.inputs} == {storage}
        picture = capture.output.mT.flatten(1, 2).unflatten(2, (3, 5))
        assert memory_of(picture) == memory_of(capture.output)


def test_device_and_dtype_reach_every_parameter():
    assert_factory(partial(LiteMLA, 32))


def test_serves():
    assert_serves(LiteMLA(32, dim=16).eval(), torch.randn(2, 32, 3, 5))


def test_compiles():
    layer = LiteMLA(32, dim=16).eval()
    assert_compiles(layer, (torch.randn(2, 32, 3, 5),), (torch.randn(2, 32, 4, 7),))


def test_kernels(monkeypatch):
    layer = LiteMLA(32, dim=16, norm_layer=None)
    assert_kernels_agree(monkeypatch, layer, torch.randn(1, 32, 3, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 64}, "There must be a head at least, got heads=0 of dim=64 for in_channels=32"),
        ({"scales": (4,)}, "kernel_size must be odd"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LiteMLA(32, **settings)

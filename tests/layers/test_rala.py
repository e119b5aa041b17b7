"""RALA is its formula on pictures of any size, and has the official parameters."""

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
)

from fbila.layers import RALA, rala

SHAPES = {
    "qkvo.weight": (128, 32, 1, 1),
    "qkvo.bias": (128,),
    "lepe.weight": (32, 1, 5, 5),
    "lepe.bias": (32,),
    "proj.weight": (32, 32, 1, 1),
    "proj.bias": (32,),
}


def rotate(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """`(..., h w, d)` turned: first half of the channels by row, 10000^-linspace(0, 1, d / 4)."""
    d = x.shape[-1]
    rate = 10000 ** -torch.linspace(0, 1, d // 4, dtype=torch.float64)
    i, j = torch.arange(h * w) // w, torch.arange(h * w) % w
    angle = torch.cat((i[:, None] * rate, j[:, None] * rate), -1).repeat_interleave(2, -1)
    partner = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * angle.cos() + partner * angle.sin()


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, *, heads: int) -> torch.Tensor:
    """The published formula, with an explicit (N, N) matrix."""
    b, c, h, w = x.shape
    n, d = h * w, c // heads
    q, k, v, g = (F.conv2d(x, p["qkvo.weight"], p["qkvo.bias"])).split(c, 1)
    lepe = F.conv2d(v, p["lepe.weight"], p["lepe.bias"], padding=2, groups=c)
    q, k, v = (t.reshape(b, heads, d, n).transpose(2, 3) for t in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    alpha = torch.softmax(d**-0.5 * q.mean(2, keepdim=True) @ k.transpose(2, 3), -1)
    k = n * alpha.transpose(2, 3) * k
    z = (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    o = (rotate(q, h, w) @ rotate(k, h, w).transpose(2, 3)) / n @ v / z
    o = o.transpose(2, 3).reshape(b, c, h, w)
    return F.conv2d((o + lepe) * g, p["proj.weight"], p["proj.bias"])


@pytest.mark.parametrize(
    ("dim", "heads", "h", "w"), [(32, 4, 5, 7), (24, 1, 4, 4), (24, 2, 1, 3), (64, 2, 9, 6)]
)
def test_formula(dim, heads, h, w):
    torch.manual_seed(0)
    assert_formula(RALA(dim, heads), by_hand, torch.randn(2, dim, h, w), heads=heads)


def test_channels_last():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 5, 7).to(memory_format=torch.channels_last)
    layer = RALA(32, 4)
    assert_formula(layer, by_hand, x, heads=4)
    assert layer(x.double()).is_contiguous(memory_format=torch.channels_last)


def test_names_and_shapes():
    assert {n: tuple(p.shape) for n, p in RALA(32, 4).state_dict().items()} == SHAPES


def test_tables_can_be_shared():
    layer, x = RALA(32, 4), torch.randn(1, 32, 3, 5)
    assert torch.equal(layer(x, layer.rope(3, 5, x)), layer(x))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied_on_the_way(monkeypatch, order):
    layer = RALA(32, 4).to(memory_format=order)
    seen = {}
    layer.qkvo.register_forward_hook(lambda _, __, out: seen.update(qkvo=out))
    capture = Capture(rala.linear_attn)
    monkeypatch.setattr(rala, "linear_attn", capture)
    layer(torch.randn(2, 32, 3, 5).to(memory_format=order))
    assert {memory_of(t) for t in capture.inputs} == {memory_of(seen["qkvo"])}
    picture = capture.output.mT.flatten(1, 2).unflatten(2, (3, 5))
    assert memory_of(picture) == memory_of(capture.output)


def test_device_and_dtype_reach_every_parameter():
    assert_factory(partial(RALA, 32, 4))


def test_serves():
    assert_serves(RALA(32, 4), torch.randn(2, 32, 3, 5))


def test_compiles():
    assert_compiles(RALA(32, 4), (torch.randn(2, 32, 3, 5),), (torch.randn(2, 32, 4, 7),))


def test_kernels(monkeypatch):
    assert_kernels_agree(monkeypatch, RALA(32, 2), torch.randn(1, 32, 3, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 32, "num_heads": 5}, "num_heads must divide dim, got dim=32 and num_heads=5"),
        ({"dim": 24, "num_heads": 4}, "dim / num_heads to be a multiple of 4: 6"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RALA(**settings)

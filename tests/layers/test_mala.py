"""MALA is its formula on pictures of any size, and has the official parameters."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, passes_made
from test_rala import SHAPES, rotate
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_factory,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
    memory_of,
    run,
)

from fbila.layers import MALA, mala
from fbila.ops import magnitude


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, *, heads: int) -> torch.Tensor:
    """The published formula, with an explicit (N, N) matrix."""
    b, c, h, w = x.shape
    n, d = h * w, c // heads
    q, k, v, g = (F.conv2d(x, p["qkvo.weight"], p["qkvo.bias"])).split(c, 1)
    lepe = F.conv2d(v, p["lepe.weight"], p["lepe.bias"], padding=2, groups=c)
    q, k, v = (t.reshape(b, heads, d, n).transpose(2, 3) for t in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = (q @ k.transpose(2, 3)).mean(-1, keepdim=True) * d**-0.5
    scores = rotate(q, h, w) @ rotate(k, h, w).transpose(2, 3) * d**-0.5
    # The weights of the paper: beta q . k - gamma, over N.
    weights = ((1 + 1 / (z + 1e-6)) * scores - z) / n
    o = (weights @ v).transpose(2, 3).reshape(b, c, h, w)
    return F.conv2d((o + lepe) * g, p["proj.weight"], p["proj.bias"])


@pytest.mark.parametrize(
    ("dim", "heads", "h", "w"), [(32, 4, 5, 7), (24, 1, 4, 4), (24, 2, 1, 3), (64, 2, 9, 6)]
)
def test_formula(dim, heads, h, w):
    torch.manual_seed(0)
    assert_formula(MALA(dim, heads), by_hand, torch.randn(2, dim, h, w), heads=heads)


def test_names_and_shapes():
    assert {n: tuple(p.shape) for n, p in MALA(32, 4).state_dict().items()} == SHAPES


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied_on_the_way(monkeypatch, order):
    layer = MALA(32, 4).to(memory_format=order)
    seen = {}
    layer.qkvo.register_forward_hook(lambda _, __, out: seen.update(qkvo=out))
    keys, queries = Capture(mala.linear_attn_state), Capture(mala.linear_attn_apply)
    monkeypatch.setattr(mala, "linear_attn_state", keys)
    monkeypatch.setattr(mala, "linear_attn_apply", queries)
    layer(torch.randn(2, 32, 3, 5).to(memory_format=order))
    read = [*keys.inputs, queries.inputs[0]]
    assert {memory_of(t) for t in read} == {memory_of(seen["qkvo"])}


def test_device_and_dtype_reach_every_parameter():
    assert_factory(partial(MALA, 32, 4))


def test_serves():
    assert_serves(MALA(32, 4), torch.randn(2, 32, 3, 5))


def test_compiles():
    assert_compiles(MALA(32, 4), (torch.randn(2, 32, 3, 5),), (torch.randn(2, 32, 4, 7),))


def test_kernels(monkeypatch):
    assert_kernels_agree(monkeypatch, MALA(32, 2), torch.randn(1, 32, 3, 5))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_what_ends_it_is_a_kernel_either_way(monkeypatch, order):
    layer, x = MALA(32, 2).to(DEVICE), torch.randn(2, 32, 3, 5).to(DEVICE, memory_format=order)
    expected = run(layer, x)
    launched = passes_made(monkeypatch, magnitude)
    for ours, theirs in zip(run(layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.stride() == theirs.stride()
    assert launched == ["in_kernel", "backward_in_kernel"]
    launched.clear()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected[0])
    assert launched == ["in_kernel"]


def test_refused():
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=32 and num_heads=5"):
        MALA(32, 5)

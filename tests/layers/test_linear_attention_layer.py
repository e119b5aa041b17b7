"""The plain layer computes its formula, loads softmax weights, and copies nothing on the way."""

import pytest
import torch
from torch import nn

from fbila.layers import LinearAttention, linear_attention


def by_hand(layer: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """The docstring's formula with an explicit (N, N) matrix, feature map elu + 1."""
    n, c = x.shape[1:]
    q, k, v = layer.qkv(x).view(-1, n, 3, layer.num_heads, c // layer.num_heads).unbind(2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    mean = layer.normalizer == "mean"
    total = scores.mean(-1, keepdim=True) if mean else scores.sum(-1, keepdim=True)
    weights = scores / (n if mean else 1) / (total + layer.eps)
    return layer.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": True, "num_heads": 2},
        {"qk_norm": True, "normalizer": "sum", "eps": 1e-2},
    ],
    ids=str,
)
def test_output_and_gradients(settings):
    torch.manual_seed(0)
    layer = LinearAttention(48, **{"num_heads": 4, **settings}, dtype=torch.float64)
    x = torch.randn(2, 33, 48, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(x)
    output, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_no_copy_between_the_projections_and_the_op(monkeypatch):
    layer = LinearAttention(32, num_heads=4, qkv_bias=True)
    seen = {}

    def op(q, k, v, **settings):
        out = torch.zeros(2, 10, 4, 8).transpose(1, 2)  # token-major, as the op's contract says
        seen.update(q=q, k=k, v=v, out=out)
        return out

    monkeypatch.setattr(linear_attention, "linear_attn", op)
    layer.qkv.register_forward_hook(lambda _, __, output: seen.update(qkv=output))
    layer.proj.register_forward_pre_hook(lambda _, args: seen.update(proj=args[0]))
    layer(torch.randn(2, 10, 32))
    for part, offset in (("q", 0), ("k", 32), ("v", 64)):
        assert seen[part].data_ptr() == seen["qkv"].data_ptr() + 4 * offset
        assert seen[part].shape == (2, 4, 10, 8)
        assert seen[part].stride() == (10 * 96, 8, 96, 1)
    assert seen["proj"].data_ptr() == seen["out"].data_ptr()


def test_parameters_bear_timms_names():
    timm_attention = pytest.importorskip("timm.layers.attention").Attention
    theirs = timm_attention(32, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    ours = LinearAttention(32, num_heads=4, qkv_bias=True, qk_norm=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_autocast_with_norms():
    layer = LinearAttention(32, num_heads=4, qk_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 10, 32)).dtype == torch.bfloat16


def test_dropout_after_the_projection():
    layer = LinearAttention(32, num_heads=4, proj_drop=1.0)
    assert not layer(torch.randn(1, 5, 32)).any()
    assert layer.eval()(torch.randn(1, 5, 32)).all()


def test_device_and_dtype_reach_every_parameter():
    layer = LinearAttention(32, qkv_bias=True, qk_norm=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide dim, got dim=32 and num_heads=5"),
        ({"attn_drop": 0.1}, "attn_drop=0.1: linear attention has no attention map"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(32, **settings)

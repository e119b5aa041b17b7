"""The map of both signs: twice as many features as channels."""

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    MAPS,
    Variant,
    assert_accurate,
    assert_equations,
    make_qkv,
)

import fbila

MEAN = Variant("mean", "signed", eps=1e-4)
each_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "K, V",
    [(1, 1), (16, 8), (17, 40), (32, 16), (33, 64), (48, 24), (64, 130), (100, 50), (128, 64)],
)
def test_head_dims(K, V, dtype):
    assert_accurate(*make_qkv((1, 2, 20, 35, K, V), dtype), MEAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    tensors = make_qkv((1, 2, 20, 20, 24, 12), dtype)
    assert_accurate(*map(LAYOUTS[layout], tensors), MEAN)


@each_impl
def test_it_is_polaformers(impl):
    """Queries meet keys of the same sign for one half of the values, of the other sign for the
    other; the powers are learned, one a channel."""
    q, k, v, _ = make_qkv((2, 3, 20, 33, 8, 8), torch.float64)
    p = 1 + 4 * torch.rand(3, 1, 8, dtype=q.dtype, device=DEVICE)

    def attend(f, g, v):
        return f @ (g.transpose(-1, -2) @ v / 33) / (f @ g.mean(2).unsqueeze(-1) + 1e-6)

    (q_plus, q_minus), (k_plus, k_minus) = ((x.relu() ** p, (-x).relu() ** p) for x in (q, k))
    g = torch.cat((k_plus, k_minus), -1)
    same = attend(torch.cat((q_plus, q_minus), -1), g, v[..., :4])
    opposite = attend(torch.cat((q_minus, q_plus), -1), g, v[..., 4:])

    q, k = (x.sign() * x.abs() ** p for x in (q, k))
    how = {"feature_map": "signed", "impl": impl}
    assert_equations(fbila.linear_attn(q, k, v[..., :4], **how), same)
    assert_equations(fbila.linear_attn(-q, k, v[..., 4:], **how), opposite)


@each_impl
def test_a_state_has_rows_for_both_signs(impl):
    q, k, v, _ = make_qkv((2, 2, 9, 12, 5, 3), torch.float64)
    how = {"feature_map": "signed", "impl": impl}
    left, right = (
        fbila.linear_attn_state(k[:, :, half], v[:, :, half], **how)
        for half in (slice(0, 7), slice(7, 12))
    )
    assert left.kv.shape == (2, 2, 10, 3) and left.key_sum.shape == (2, 2, 10)
    assert_equations((left + right).kv, MAPS["signed"](k).transpose(-1, -2) @ v)
    o = fbila.linear_attn_apply(q, left + right, **how)
    assert_equations(o, fbila.linear_attn(q, k, v, **how))


@each_impl
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_the_features(interleaved, impl):
    q, k, v, _ = make_qkv((1, 2, 12, 12, 6, 4), torch.float64)
    angles = torch.rand(12, 6, dtype=q.dtype, device=DEVICE)
    rotary = fbila.Rotary(angles.cos(), angles.sin(), interleaved)
    f, g = (MAPS["signed"](x) for x in (q, k))
    o = fbila.linear_attn(q, k, v, feature_map="signed", rotary=rotary, impl=impl)
    assert_equations(o, fbila.linear_attn(f, g, v, rotary=rotary, impl="reference"))


@each_impl
def test_the_gradient_at_zero_is_zero(impl):
    q, k, v, do = (x.requires_grad_() for x in make_qkv((1, 1, 9, 12, 6, 4), torch.float64))
    with torch.no_grad():
        q[..., ::2], k[..., 0] = 0, 0
    o = fbila.linear_attn(q, k, v, feature_map="signed", impl=impl)
    dq, dk = torch.autograd.grad(o, (q, k), do.detach())
    assert not dq[..., ::2].any() and not dk[..., 0].any()
    assert dq[..., 1::2].all() and dk[..., 1::2].all()

"""Rotary turns phi(q) and phi(k) in the numerator, pair by pair, and leaves the denominator."""

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_derivatives,
    assert_equations,
    assert_on_rail,
    make_qkv,
)

from fbila import Rotary, linear_attn, simple_la

IMPLEMENTATIONS = ["reference", "triton"]
SHAPE = (2, 3, 5, 5, 6, 4)  # B, H, N, M, K, V
PAIRS = {True: [(0, 1), (2, 3), (4, 5)], False: [(0, 3), (1, 4), (2, 5)]}

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_pairing = pytest.mark.parametrize("interleaved", [True, False])
each_table = pytest.mark.parametrize("per_head", [False, True])


def make_tables(interleaved, per_head, shape=SHAPE, dtype=torch.float64):
    """Angles that differ in every row, column and head."""
    _, H, N, _, K, _ = shape
    generator = torch.Generator(DEVICE).manual_seed(7)
    size = (H, N, K // 2) if per_head else (N, K // 2)
    angles = 3 * torch.randn(size, generator=generator, dtype=torch.float64, device=DEVICE)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


def turned(x, rotary):
    """One row of features after the other, one pair after the other."""
    y = x.clone()
    for h in range(x.shape[1]):
        cos, sin = (t if t.dim() == 2 else t[h] for t in (rotary.cos, rotary.sin))
        for i in range(x.shape[2]):
            for n, (a, b) in enumerate(PAIRS[rotary.interleaved]):
                y[:, h, i, a] = x[:, h, i, a] * cos[i, n] - x[:, h, i, b] * sin[i, n]
                y[:, h, i, b] = x[:, h, i, b] * cos[i, n] + x[:, h, i, a] * sin[i, n]
    return y


@each_impl
@each_table
@each_pairing
@pytest.mark.parametrize("normalizer, eps", [("mean", 0.1), ("sum", 0.5)])
def test_numerator_alone(normalizer, eps, interleaved, per_head, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(interleaved, per_head)
    options = {"normalizer": normalizer, "eps": eps, "rotary": rotary, "impl": impl}
    f, g = q.exp(), k.exp()
    numerator = turned(f, rotary) @ turned(g, rotary).transpose(-1, -2) @ v
    denominator = (f @ g.transpose(-1, -2)).sum(-1, keepdim=True) + 0.5  # 5 keys: the same eps
    assert_equations(linear_attn(f, g, v, **options), numerator / denominator)


@each_impl
@each_table
@each_pairing
def test_without_a_denominator(interleaved, per_head, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(interleaved, per_head)
    o = simple_la(q, k, v, feature_map="relu", scale=0.5, rotary=rotary, impl=impl)
    f, g = turned(q.relu(), rotary), turned(k.relu(), rotary)
    assert_equations(o, 0.5 * f @ g.transpose(-1, -2) @ v)


@each_impl
@each_pairing
def test_after_the_feature_map_not_before(interleaved, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(interleaved, False)
    fused = simple_la(q, k, v, feature_map="elu1", rotary=rotary, impl=impl)
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    assert_equations(fused, simple_la(turned(phi_q, rotary), turned(phi_k, rotary), v, impl=impl))


@each_impl
def test_a_plain_pair_is_interleaved(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(True, False)
    o = linear_attn(q, k, v, feature_map="elu1", rotary=(rotary.cos, rotary.sin), impl=impl)
    assert torch.equal(o, linear_attn(q, k, v, feature_map="elu1", rotary=rotary, impl=impl))
    other = rotary._replace(interleaved=False)
    assert not torch.equal(o, linear_attn(q, k, v, feature_map="elu1", rotary=other, impl=impl))


@each_impl
@each_pairing
def test_only_distances_count(interleaved, impl):
    # Angles that grow evenly with the position: moving all tokens together changes nothing.
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    steps = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64, device=DEVICE)
    here = torch.arange(5, device=DEVICE)[:, None] * steps
    there = here + 100 * steps
    o, moved = (
        simple_la(q, k, v, rotary=Rotary(x.cos(), x.sin(), interleaved), impl=impl)
        for x in (here, there)
    )
    assert_equations(moved, o)


@each_impl
@each_table
@each_pairing
@pytest.mark.parametrize("function", [linear_attn, simple_la])
def test_gradients(function, interleaved, per_head, impl):
    shape = (1, 2, 3, 3, 6, 2)
    q, k, v, _ = make_qkv(shape, torch.float64, away_from_zero=True)
    rotary = make_tables(interleaved, per_head, shape)

    def rotated(*qkv, impl):
        return function(*qkv, feature_map="elu1", rotary=rotary, impl=impl)

    assert_derivatives(rotated, [x.requires_grad_() for x in (q, k, v)], impl)


@each_impl
@each_pairing
@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tables_of_any_float_dtype(table_dtype, interleaved, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(interleaved, True, dtype=table_dtype)
    wide = rotary._replace(cos=rotary.cos.double(), sin=rotary.sin.double())
    o = simple_la(q, k, v, rotary=rotary, impl=impl)
    assert_equations(o, simple_la(q, k, v, rotary=wide, impl=impl))


@each_impl
@each_pairing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_accurate_with_float32_tables(dtype, interleaved, impl):
    shape = (1, 2, 70, 70, 16, 24)
    q, k, v, _ = make_qkv(shape, dtype)
    rotary = make_tables(interleaved, False, shape, torch.float32)
    truth = simple_la(q.double(), k.double(), v.double(), rotary=rotary, impl="reference")
    o = simple_la(q, k, v, rotary=rotary, impl=impl)
    assert o.dtype == dtype
    assert_on_rail(o, truth)


@each_impl
@pytest.mark.parametrize("layout", ["token_major", "every_second_token", "surrounded"])
def test_tables_and_tensors_of_any_strides(layout, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    rotary = make_tables(True, True)
    expected = simple_la(q, k, v, rotary=rotary, impl=impl)
    strided = rotary._replace(
        cos=LAYOUTS[layout](rotary.cos[None])[0], sin=LAYOUTS[layout](rotary.sin[None])[0]
    )
    assert torch.equal(strided.cos, rotary.cos)
    q, k, v = (LAYOUTS[layout](x) for x in (q, k, v))
    assert_equations(simple_la(q, k, v, rotary=strided, impl=impl), expected)


@each_impl
def test_heads_that_share_a_table_by_stride_0(impl):
    q, k, v, _ = make_qkv((1, 3, 1, 1, 6, 4), torch.float64)
    shared = make_tables(False, False, (1, 3, 1, 1, 6, 4))
    expanded = shared._replace(cos=shared.cos.expand(3, 1, 3), sin=shared.sin.expand(3, 1, 3))
    o = simple_la(q, k, v, rotary=shared, impl=impl)
    assert_equations(simple_la(q, k, v, rotary=expanded, impl=impl), o)
    # One token, one key: both turn by the same angle.
    assert_equations(o, simple_la(q, k, v, impl=impl))

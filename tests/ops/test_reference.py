"""The reference is the equations, and the triton operators are the reference."""

import pytest
import torch
from helpers import ALL_VARIANTS, DEVICE, DTYPES, MEAN, SIMPLE, SUM, assert_accurate, make_qkv

from fbila import linear_attn, simple_la


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def qkv():
    q, k, v, _ = make_qkv((2, 3, 7, 5, 4, 6), torch.float64)
    return q, k, v


def test_simple_la_is_one_einsum(qkv):
    q, k, v = qkv
    expected = torch.einsum("bhnk,bhmk,bhmv->bhnv", q, k, v)
    close(simple_la(q, k, v, scale=1.0, impl="reference"), expected)
    close(simple_la(q, k, v, scale=-2.5, impl="reference"), -2.5 * expected)
    close(simple_la(q, k, v, impl="reference"), expected / 2)  # K = 4


@pytest.mark.parametrize("normalizer, eps", [("sum", 0.3), ("mean", 0.3 / 5)])
def test_linear_attn_is_attention_with_a_linear_kernel(qkv, normalizer, eps):
    q, k, v = (x.exp() for x in qkv)
    weights = torch.einsum("bhnk,bhmk->bhnm", q, k)
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 0.3)
    close(linear_attn(q, k, v, normalizer=normalizer, eps=eps, impl="reference"), expected)


def test_default_normalizer_is_the_mean_with_eps_1e6(qkv):
    q, k, v = (x.abs() * 1e-3 for x in qkv)
    weights = torch.einsum("bhnk,bhmk->bhnm", q, k)
    expected = (weights @ v / 5) / (weights.mean(-1, keepdim=True) + 1e-6)
    close(linear_attn(q, k, v, impl="reference"), expected)
    close(linear_attn(q, k, v, impl="triton"), expected)


def test_feature_maps(qkv):
    q, k, v = qkv
    for name, phi in (("elu1", lambda x: torch.nn.functional.elu(x) + 1), ("relu", torch.relu)):
        expected = torch.einsum("bhnk,bhmk,bhmv->bhnv", phi(q), phi(k), v)
        close(simple_la(q, k, v, feature_map=name, scale=1, impl="reference"), expected)


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_every_variant_is_accurate(variant, dtype, impl):
    qkv = make_qkv((2, 3, 19, 35, 16, 24), dtype, variant=variant)
    assert_accurate(*qkv, variant, impl=impl)


@pytest.mark.parametrize("variant", [MEAN, SUM, SIMPLE], ids=lambda x: x.name)
def test_reference_computes_half_precision_in_float32(variant):
    q, k, v, _ = make_qkv((1, 2, 33, 65, 16, 8), torch.float16)
    wide = variant(q.float(), k.float(), v.float(), impl="reference")
    assert torch.equal(variant(q, k, v, impl="reference"), wide.half())


def test_normalizers_agree_where_eps_does():
    q, k, v, _ = make_qkv((1, 2, 20, 16, 8, 8), torch.float32)
    options = {"feature_map": "elu1", "impl": "triton"}
    mean = linear_attn(q, k, v, normalizer="mean", eps=0.5, **options)
    total = linear_attn(q, k, v, normalizer="sum", eps=0.5 * 16, **options)
    assert torch.equal(mean, total)
    assert not torch.equal(mean, linear_attn(q, k, v, normalizer="sum", eps=0.5, **options))


def test_normalised_is_unnormalised_over_its_denominator():
    q, k, v, _ = make_qkv((2, 2, 20, 30, 16, 16), torch.float32)
    options = {"feature_map": "elu1", "impl": "triton"}
    numerator = simple_la(q, k, v, scale=1.0, **options)
    denominator = simple_la(q, k, torch.ones_like(v[..., :1]), scale=1.0, **options)
    o = linear_attn(q, k, v, eps=0, **options)
    torch.testing.assert_close(o, numerator / denominator, rtol=1e-5, atol=1e-6)


def test_without_impl_the_device_decides():
    q, k, v, _ = make_qkv((1, 2, 20, 30, 16, 16), torch.float16)
    expected = "triton" if DEVICE == "cuda" else "reference"
    assert torch.equal(simple_la(q, k, v), simple_la(q, k, v, impl=expected))

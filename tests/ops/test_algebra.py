"""Identities of linear attention that hold whatever the values are."""

import pytest
import torch
from helpers import DEVICE, DTYPES, MEAN, SIMPLE, SUM, make_qkv

from fbila import linear_attn, simple_la

NORMALISED = [MEAN._replace(eps=0.0), SUM._replace(feature_map="elu1", eps=0.0)]

each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_normalised = pytest.mark.parametrize("variant", NORMALISED, ids=lambda x: x.name)


def assert_close(a, b, ulps=4):
    bound = ulps * torch.finfo(a.dtype).eps * float(b.abs().max())
    assert float((a.double() - b.double()).abs().max()) <= bound


@each_dtype
@each_normalised
def test_a_constant_value_comes_back(variant, dtype):
    q, k, v, _ = make_qkv((2, 2, 33, 70, 17, 8), dtype)
    constant = v[:, :, :1].expand_as(v)
    assert_close(variant(q, k, constant), v[:, :, :1].expand(2, 2, 33, 8))


@each_dtype
@each_normalised
def test_a_single_key_gives_its_value(variant, dtype):
    q, k, v, _ = make_qkv((2, 2, 5, 1, 16, 8), dtype)
    assert_close(variant(q, k, v), v.expand(2, 2, 5, 8))


@each_dtype
@each_normalised
def test_keys_given_twice_change_nothing(variant, dtype):
    q, k, v, _ = make_qkv((1, 2, 33, 70, 16, 8), dtype)
    twice = variant(q, torch.cat([k, k], 2), torch.cat([v, v], 2))
    assert_close(twice, variant(q, k, v))


@each_dtype
@pytest.mark.parametrize("variant", [*NORMALISED, SIMPLE], ids=lambda x: x.name)
def test_the_order_of_keys_does_not_matter(variant, dtype):
    q, k, v, _ = make_qkv((1, 2, 20, 70, 16, 8), dtype)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_close(variant(q, k[:, :, order], v[:, :, order]), variant(q, k, v), ulps=8)


@each_dtype
@pytest.mark.parametrize("power", [-3, 4])
@pytest.mark.parametrize("feature_map", [None, "relu"])
def test_the_size_of_keys_cancels_exactly(feature_map, power, dtype):
    q, k, v, _ = make_qkv((1, 2, 33, 40, 17, 16), dtype)
    q, k = q.abs() + 0.1, k.abs() + 0.1
    o = linear_attn(q, k, v, feature_map=feature_map, eps=0, impl="triton")
    scaled = linear_attn(q, k * 2.0**power, v, feature_map=feature_map, eps=0, impl="triton")
    assert torch.equal(o, scaled)


@each_dtype
def test_simple_la_of_two_sets_of_keys_is_the_sum_of_both(dtype):
    q, k, v, _ = make_qkv((1, 2, 33, 70, 16, 8), dtype)
    whole = simple_la(q, k, v, impl="triton")
    parts = [simple_la(q, k[:, :, i], v[:, :, i], impl="triton").double()
             for i in (slice(0, 30), slice(30, 70))]  # fmt: skip
    assert_close(whole, sum(parts))


@each_dtype
def test_scale_is_a_factor(dtype):
    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), dtype)
    quarter = simple_la(q, k, v, impl="triton")  # K = 16
    assert torch.equal(simple_la(q, k, v, scale=0.25, impl="triton"), quarter)
    assert torch.equal(simple_la(q, k, v, scale=-0.5, impl="triton"), -2 * quarter)
    assert_close(simple_la(q, k, v, scale=0.3, impl="triton"), quarter.double() * 1.2)
    assert torch.equal(simple_la(q, k, v, scale=0.0, impl="triton"), torch.zeros_like(quarter))

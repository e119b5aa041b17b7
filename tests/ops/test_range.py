"""Sums beyond the range of the inputs' dtype, at both ends, cost no accuracy."""

import pytest
import torch
from helpers import CUDA, LOW, MEAN, SIMPLE, SUM, Variant, assert_accurate, eager, make_qkv

M = 65536 if CUDA else 700
# Long sequences, and short ones.
each_length = pytest.mark.parametrize("M", [M, 250])

each_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


@each_dtype
@pytest.mark.parametrize("variant", [MEAN, SUM], ids=lambda x: x.name)
@each_length
def test_state_beyond_float16(M, variant, dtype):
    q, k, v, do = make_qkv((1, 2, 33, M, 16, 8), dtype)
    k, v = k * 30, v * 30 + 30
    assert eager(q.double(), k.double(), v.double(), variant).abs().max() < 65504
    assert (k.double().relu().transpose(-1, -2) @ v.double()).abs().max() > 65504
    assert_accurate(q * 30, k, v, do, variant)


@each_dtype
@each_length
def test_unnormalised_state_beyond_float16(M, dtype):
    q, k, v, do = make_qkv((1, 2, 33, M, 16, 8), dtype)
    k, v = k.abs() * 30, v * 30 + 30
    assert (k.double().transpose(-1, -2) @ v.double()).abs().min() > 65504
    assert_accurate(q * 1e-2, k, v, do * 1e-2, SIMPLE._replace(scale=0.5 / M))


@each_dtype
@pytest.mark.parametrize("variant", [SIMPLE, Variant(None, "relu")], ids=lambda x: x.name)
def test_state_below_float16(variant, dtype):
    # k v is about 1e-7, below the smallest normal float16; q brings it back.
    q, k, v, do = make_qkv((1, 2, 33, 70, 16, 8), dtype)
    assert_accurate(q * 1e3, k * 3e-4, v * 3e-4, do, variant)


@each_dtype
@pytest.mark.parametrize("variant", [MEAN, SUM], ids=lambda x: x.name)
def test_tiny_values(variant, dtype):
    q, k, v, do = make_qkv((1, 2, 33, 70, 16, 8), dtype)
    assert_accurate(q, k, v * 2e-4, do * 2e-4, variant)


@each_dtype
def test_tiny_features(dtype):
    variant = Variant("mean", "relu", eps=0.0)
    q, k, v, do = make_qkv((1, 2, 33, 70, 16, 8), dtype)
    assert_accurate(q * 1e-3, k * 1e-3, v, do * 1e-3, variant)


@each_dtype
def test_many_small_terms_do_not_vanish(dtype):
    # 1 + eps = 1: a sum kept in the inputs' dtype would stop growing.
    tokens = 4096 if CUDA else 2600
    x = torch.ones(1, 1, tokens, 16, dtype=dtype, device=make_qkv((1,) * 6, dtype)[0].device)
    o = SIMPLE._replace(scale=1 / tokens)(x[:, :, :4], x, x)
    assert torch.equal(o, torch.full_like(o, 16.0))


@pytest.mark.gpu
def test_bfloat16_reaches_further():
    q, k, v, do = make_qkv((1, 2, 333, M, 64, 64), torch.bfloat16)
    assert_accurate(q * 1e3, k * 1e3, v * 1e3, do, MEAN)

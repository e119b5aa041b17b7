"""key_weight multiplies a key's features in both sums; the mean still divides by the keys."""

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    MAPS,
    assert_derivatives,
    assert_equations,
    assert_on_rail,
    assert_same_bits,
    make_qkv,
)

from fbila import linear_attn, simple_la

IMPLEMENTATIONS = ["reference", "triton"]
SHAPE = (2, 3, 5, 7, 4, 6)  # B, H, N, M, K, V

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_rank = pytest.mark.parametrize("per_head", [False, True])


def make_weight(per_head, shape=SHAPE, dtype=torch.float64):
    B, H, _, M, _, _ = shape
    generator = torch.Generator(DEVICE).manual_seed(3)
    size = (B, H, M) if per_head else (B, M)
    return torch.rand(size, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype)


def sums(k, v, weight):
    """kv and key_sum, one key after the other."""
    B, H, M, _ = k.shape
    kv = k.new_zeros(B, H, k.shape[-1], v.shape[-1])
    key_sum = k.new_zeros(B, H, k.shape[-1])
    for b in range(B):
        for h in range(H):
            for j in range(M):
                w = weight[b, j] if weight.dim() == 2 else weight[b, h, j]
                kv[b, h] += w * torch.outer(k[b, h, j], v[b, h, j])
                key_sum[b, h] += w * k[b, h, j]
    return kv, key_sum


@each_impl
@each_rank
@pytest.mark.parametrize("feature_map", [None, "elu1"])
@pytest.mark.parametrize("normalizer, eps", [("mean", 0.1), ("sum", 0.7)])
def test_both_sums(normalizer, eps, feature_map, per_head, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    q, k = q.exp(), k.exp()
    weight = make_weight(per_head)
    f, g = MAPS[feature_map](q), MAPS[feature_map](k)
    kv, key_sum = sums(g, v, weight)
    # Seven keys, whatever they weigh: eps 0.1 beside the mean is 0.7 beside the sum.
    expected = f @ kv / (f @ key_sum.unsqueeze(-1) + 0.7)
    options = {"feature_map": feature_map, "normalizer": normalizer, "eps": eps, "impl": impl}
    assert_equations(linear_attn(q, k, v, key_weight=weight, **options), expected)


@each_impl
@each_rank
def test_without_a_denominator(per_head, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    weight = make_weight(per_head)
    expected = 0.5 * q @ sums(k, v, weight)[0]
    assert_equations(simple_la(q, k, v, scale=0.5, key_weight=weight, impl=impl), expected)


@each_impl
@each_rank
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ones_change_nothing(dtype, per_head, impl):
    q, k, v, _ = make_qkv(SHAPE, dtype)
    ones = torch.ones_like(make_weight(per_head), dtype=dtype)
    for function in (linear_attn, simple_la):
        plain = function(q, k, v, feature_map="elu1", impl=impl)
        weighted = function(q, k, v, feature_map="elu1", key_weight=ones, impl=impl)
        assert_same_bits([weighted], [plain], reordered=True)


@each_impl
def test_negative_and_zero_weights(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    weight = make_weight(True) - 0.5
    weight[:, :, ::3] = 0
    expected = q @ sums(k, v, weight)[0] / 2  # K = 4
    assert_equations(simple_la(q, k, v, key_weight=weight, impl=impl), expected)


@each_impl
@each_rank
@pytest.mark.parametrize("feature_map", [None, "elu1", "relu"])
@pytest.mark.parametrize("function", [linear_attn, simple_la])
def test_gradients(function, feature_map, per_head, impl):
    shape = (1, 2, 3, 4, 3, 2)
    q, k, v, _ = make_qkv(shape, torch.float64, away_from_zero=True)
    if feature_map is None:
        q, k = q.abs(), k.abs()
    weight = make_weight(per_head, shape)

    def weighted(q, k, v, key_weight, impl):
        return function(q, k, v, feature_map=feature_map, key_weight=key_weight, impl=impl)

    leaves = [x.detach().requires_grad_() for x in (q, k, v, weight)]
    assert_derivatives(weighted, leaves, impl)


@each_impl
@each_rank
@pytest.mark.parametrize("wanted", ["weight", "q", "k and v"])
def test_partial_gradients(wanted, per_head, impl):
    q, k, v, do = make_qkv(SHAPE, torch.float64)
    everything = [x.detach().requires_grad_() for x in (q, k, v, make_weight(per_head))]

    def weighted(q, k, v, key_weight):
        return linear_attn(q, k, v, feature_map="elu1", key_weight=key_weight, impl=impl)

    expected = torch.autograd.grad(weighted(*everything), everything, do)
    chosen = {"weight": [3], "q": [0], "k and v": [1, 2]}[wanted]
    some = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(everything)]
    weighted(*some).backward(do)
    for i, x in enumerate(some):
        if i in chosen:
            assert_equations(x.grad, expected[i])
        else:
            assert x.grad is None


@each_impl
@each_rank
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes_of_tensors_and_weights_may_differ(weight_dtype, dtype, per_head, impl):
    q, k, v, do = make_qkv(SHAPE, dtype)
    weight = make_weight(per_head, dtype=weight_dtype).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    options = {"feature_map": "elu1", "eps": 1e-4}
    o = linear_attn(q, k, v, key_weight=weight, impl=impl, **options)
    truth = linear_attn(
        q.double(), k.double(), v.double(), key_weight=wide, impl="reference", **options
    )
    assert o.dtype == dtype
    assert_on_rail(o.detach(), truth.detach())
    o.backward(do)
    truth.backward(do.double())
    assert weight.grad.dtype == weight_dtype and weight.grad.shape == weight.shape
    limit = 8 * max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    assert (weight.grad - wide.grad).abs().max() <= limit * wide.grad.abs().max()


@each_impl
def test_weights_of_any_strides(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    weight = make_weight(True)
    expected = linear_attn(q, k, v, feature_map="elu1", key_weight=weight, impl=impl)
    token_major = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expanded = weight[:, :1].expand(-1, 3, -1)
    o = linear_attn(q, k, v, feature_map="elu1", key_weight=token_major, impl=impl)
    assert_equations(o, expected)
    shared = linear_attn(q, k, v, feature_map="elu1", key_weight=weight[:, 0], impl=impl)
    o = linear_attn(q, k, v, feature_map="elu1", key_weight=expanded, impl=impl)
    assert_equations(o, shared)

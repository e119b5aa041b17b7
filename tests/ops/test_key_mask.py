"""A masked key is as if it were not there: in the sums, in the count, in the gradients, as NaN."""

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    VARIANTS,
    Variant,
    assert_derivatives,
    assert_equations,
    make_qkv,
)

from fbila import linear_attn, simple_la

IMPLEMENTATIONS = ["reference", "triton"]
SHAPE = (2, 3, 5, 40, 4, 6)  # B, H, N, M, K, V
NAN, INF = float("nan"), float("inf")

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_variant = pytest.mark.parametrize(
    "variant", [*VARIANTS, Variant("mean", "elu1", 0.3), Variant(None, "elu1")], ids=str
)


def attend(variant, q, k, v, impl, **options):
    if variant.normalizer is None:
        return simple_la(q, k, v, feature_map=variant.feature_map, impl=impl, **options)
    options.update(feature_map=variant.feature_map, normalizer=variant.normalizer)
    return linear_attn(q, k, v, eps=variant.eps, impl=impl, **options)


def make_mask(B, M):
    """Scattered, and another one for each item."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    return torch.rand(B, M, generator=generator, device=DEVICE) < 0.6


def with_gradients(variant, q, k, v, do, impl, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attend(variant, *leaves, impl, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def assert_near(actual, expected, size=None):
    size = expected.abs().max() if size is None else size
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 4 * torch.finfo(actual.dtype).eps * size


@each_impl
@each_variant
@each_dtype
def test_padding_is_truncation(dtype, variant, impl):
    q, k, v, _ = make_qkv(SHAPE, dtype)
    mask = torch.arange(40, device=DEVICE).expand(2, 40) < 29
    masked = attend(variant, q, k, v, impl, key_mask=mask)
    # The mean is over 29 keys, so that eps weighs as much as without the others.
    assert_near(masked, attend(variant, q, k[:, :, :29], v[:, :, :29], impl))


@each_impl
@each_variant
def test_scattered_keys_and_their_gradients(variant, impl):
    q, k, v, do = make_qkv(SHAPE, torch.float64)
    mask = make_mask(2, 40)
    actual = with_gradients(variant, q, k, v, do, impl, key_mask=mask)
    for b in range(2):
        kept = mask[b]
        alone = [q[b : b + 1], k[b : b + 1, :, kept], v[b : b + 1, :, kept], do[b : b + 1]]
        o, dq, dk, dv = with_gradients(variant, *alone, impl)
        for x, y in zip((x[b : b + 1] for x in actual[:2]), (o, dq), strict=True):
            assert_equations(x, y)
        for x, y in zip((x[b] for x in actual[2:]), (dk, dv), strict=True):
            assert_equations(x[:, kept], y[0])
            assert not x[:, ~kept].any()


@each_impl
@each_variant
@each_dtype
def test_what_is_masked_may_be_anything(dtype, variant, impl):
    # One head: all of an item have the same mask.
    q, k, v, do = make_qkv((2, 1, 5, 40, 4, 6), dtype)
    mask = make_mask(2, 40)
    expected = with_gradients(variant, q, k, v, do, impl, key_mask=mask)
    absent = ~mask[:, None, :, None]
    for of_k, of_v in ((NAN, 1), (INF, 1), (-INF, 1), (1, NAN), (1, INF), (1, -INF), (NAN, NAN)):
        others = [q, k.masked_fill(absent, of_k), v.masked_fill(absent, of_v), do]
        actual = with_gradients(variant, *others, impl, key_mask=mask)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)
        for x in actual[2:]:
            assert not x.masked_select(absent).any()


@each_impl
@each_variant
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_an_item_without_keys_gives_zero(eps, variant, impl):
    variant = variant._replace(eps=eps)
    q, k, v, do = make_qkv(SHAPE, torch.float32)
    mask = make_mask(2, 40)
    mask[1] = False
    k[1], v[1] = NAN, NAN
    for x in with_gradients(variant, q.exp(), k.exp(), v, do, impl, key_mask=mask):
        assert x.isfinite().all()
        assert x[0].any() and not x[1].any()


@each_impl
@each_variant
@each_dtype
def test_a_mask_of_all_keys_changes_nothing(dtype, variant, impl):
    q, k, v, do = make_qkv(SHAPE, dtype)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    actual = with_gradients(variant, q, k, v, do, impl, key_mask=mask)
    for x, y in zip(actual, with_gradients(variant, q, k, v, do, impl), strict=True):
        assert_near(x, y)


@each_impl
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("variant", [Variant("mean", "elu1", 0.3), Variant(None, "elu1")], ids=str)
def test_with_weights(variant, per_head, impl):
    q, k, v, do = make_qkv(SHAPE, torch.float64)
    mask = make_mask(2, 40)
    weight = torch.linspace(0.1, 2, 240 if per_head else 80, dtype=torch.float64, device=DEVICE)
    weight = weight.view((2, 3, 40) if per_head else (2, 40))
    seen = mask[:, None].expand_as(weight) if per_head else mask
    weight = weight.masked_fill(~seen, NAN).requires_grad_()
    o = attend(variant, q, k, v, impl, key_mask=mask, key_weight=weight)
    (dweight,) = torch.autograd.grad(o, weight, do)
    assert dweight.isfinite().all() and not dweight[~seen].any()
    for b in range(2):
        kept = mask[b]
        alone = weight[b : b + 1, ..., kept].detach().requires_grad_()
        tensors = q[b : b + 1], k[b : b + 1, :, kept], v[b : b + 1, :, kept]
        expected = attend(variant, *tensors, impl, key_weight=alone)
        assert_equations(o[b : b + 1], expected)
        (gradient,) = torch.autograd.grad(expected, alone, do[b : b + 1])
        assert_equations(dweight[b][..., kept], gradient[0])


@each_impl
def test_with_rotary_every_key_keeps_its_position(impl):
    q, k, v, _ = make_qkv((2, 3, 40, 40, 4, 6), torch.float64)
    mask = make_mask(2, 40)
    angles = torch.arange(40, device=DEVICE)[:, None] * torch.tensor([1.0, 0.1], device=DEVICE)
    rotary = angles.double().cos(), angles.double().sin()
    o = simple_la(q, k, v, rotary=rotary, key_mask=mask, impl=impl)
    zeros = v.masked_fill(~mask[:, None, :, None], 0)
    assert_equations(o, simple_la(q, k, zeros, rotary=rotary, impl=impl))


@each_impl
@each_variant
def test_gradcheck(variant, impl):
    q, k, v, _ = make_qkv((2, 1, 3, 5, 3, 2), torch.float64, away_from_zero=True)
    variant = variant._replace(eps=1e-6)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def masked(*qkv, impl):
        return attend(variant, *qkv, impl, key_mask=mask)

    assert_derivatives(masked, leaves, impl)


@each_impl
def test_masks_of_any_strides(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    mask = make_mask(2, 40)
    expected = linear_attn(q, k, v, feature_map="elu1", key_mask=mask, impl=impl)
    wide = torch.ones(40, 5, dtype=torch.bool, device=DEVICE)
    wide[:, 1:5:3] = mask.T
    o = linear_attn(q, k, v, feature_map="elu1", key_mask=wide[:, 1:5:3].T, impl=impl)
    assert torch.equal(o, expected)
    shared = linear_attn(q, k, v, feature_map="elu1", key_mask=mask[:1].expand(2, 40), impl=impl)
    assert_equations(shared[0], expected[0])

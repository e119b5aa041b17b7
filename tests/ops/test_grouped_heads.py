"""Fewer heads of k and v than of q: query head h reads key head h // (H // Hk)."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    VARIANTS,
    assert_derivatives,
    assert_equations,
    make_qkv,
)

from fbila import linear_attn, simple_la

IMPLEMENTATIONS = ["reference", "triton"]

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
each_grouping = pytest.mark.parametrize("heads", [(6, 3), (6, 2), (4, 1), (3, 3)], ids=str)


def make_grouped(heads, dtype, N=5, M=7):
    q, _, _, do = make_qkv((2, heads[0], N, M, 4, 6), dtype)
    _, k, v, _ = make_qkv((2, heads[1], N, M, 4, 6), dtype, seed=1)
    return q, k, v, do


@each_impl
@each_variant
@each_grouping
def test_every_head_by_itself(heads, variant, impl):
    q, k, v, _ = make_grouped(heads, torch.float64)
    o = variant(q, k, v, impl=impl)
    for h in range(heads[0]):
        read = h // (heads[0] // heads[1])
        alone = variant(*(x[:, i : i + 1] for x, i in ((q, h), (k, read), (v, read))), impl=impl)
        assert_equations(o[:, h : h + 1], alone)


@each_impl
@each_grouping
def test_the_order_of_scaled_dot_product_attention(heads, impl):
    # One key: softmax and a linear kernel both give its value, so heads alone decide.
    q, k, v, _ = make_grouped(heads, torch.float64, M=1)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_equations(linear_attn(q.exp(), k.exp(), v, eps=0.0, impl=impl), expected)


@each_impl
@each_variant
@each_grouping
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_repeated_keys_and_values(dtype, heads, variant, impl):
    q, k, v, _ = make_grouped(heads, dtype)
    repeated = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
    o = variant(q, k, v, impl=impl)
    expected = variant(q, *repeated, impl=impl)
    assert o.dtype == dtype
    assert (o - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@each_impl
@each_variant
@each_grouping
def test_gradients_of_keys_are_summed_over_their_group(heads, variant, impl):
    q, k, v, do = make_grouped(heads, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(variant(*leaves, impl=impl), leaves, do)
    group = heads[0] // heads[1]
    repeated = [x.detach().repeat_interleave(group, dim=1).requires_grad_() for x in (k, v)]
    dq, dk, dv = torch.autograd.grad(variant(q, *repeated, impl=impl), [q, *repeated], do)
    assert_equations(gradients[0], dq)
    assert_equations(gradients[1], dk.unflatten(1, (heads[1], group)).sum(2))
    assert_equations(gradients[2], dv.unflatten(1, (heads[1], group)).sum(2))


@each_impl
@each_variant
def test_gradcheck(variant, impl):
    q, _, _, _ = make_qkv((1, 4, 3, 4, 3, 2), torch.float64, away_from_zero=True)
    _, k, v, _ = make_qkv((1, 2, 3, 4, 3, 2), torch.float64, away_from_zero=True, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert_derivatives(variant._replace(eps=1e-6), leaves, impl)


@each_impl
def test_with_the_other_options(impl):
    q, k, v, _ = make_grouped((6, 2), torch.float64, M=5)
    generator = torch.Generator(DEVICE).manual_seed(2)
    weight = torch.rand(2, 2, 5, generator=generator, dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool, device=DEVICE)
    angles = torch.rand(5, 2, generator=generator, dtype=torch.float64, device=DEVICE)
    options = {"rotary": (angles.cos(), angles.sin()), "key_mask": mask, "impl": impl}
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v, weight)]
    for function in (linear_attn, simple_la):
        o = function(q, k, v, feature_map="elu1", key_weight=weight, **options)
        expected = function(q, *repeated[:2], feature_map="elu1", key_weight=repeated[2], **options)
        assert_equations(o, expected)


@each_impl
@each_variant
@pytest.mark.parametrize("layout", ["token_major", "packed_qkv", "every_second_token"])
def test_layouts(layout, variant, impl):
    q, k, v, _ = make_grouped((6, 2), torch.float64)
    expected = variant(q, k, v, impl=impl)
    o = variant(*(LAYOUTS[layout](x) for x in (q, k, v)), impl=impl)
    assert_equations(o, expected)
    assert o.transpose(1, 2).is_contiguous() == (layout != "every_second_token")


@each_impl
@each_variant
@pytest.mark.parametrize("empty", ["B", "N", "M", "V", "H"])
def test_empty(empty, variant, impl):
    B, H, N, M, V = (0 if name == empty else size for name, size in zip("BHNMV", (2, 6, 5, 7, 4),
                                                                        strict=True))  # fmt: skip
    q, _, _, do = make_qkv((B, H, N, M, 4, V), torch.float32)
    _, k, v, _ = make_qkv((B, 3, N, M, 4, V), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = variant(*leaves, impl=impl)
    assert o.shape == do.shape and not o.any()
    for gradient, x in zip(torch.autograd.grad(o, leaves, do), leaves, strict=True):
        assert gradient.shape == x.shape and not gradient.any()

"""Packed sequences: each as if it were called alone, in one call and without looking at lengths."""

from itertools import pairwise

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

from fbila import Rotary, linear_attn, simple_la

IMPLEMENTATIONS = ["reference", "triton"]
BOUNDS = [0, 5, 5, 6, 23, 23, 93, 96, 96]
T = 96

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_variant = pytest.mark.parametrize(
    "variant", [*VARIANTS, Variant("mean", "elu1", 0.3)], ids=str
)


def make_packed(heads=(2, 2), dtype=torch.float64):
    """q, k, v and do `(T, H, ...)`."""
    q, _, _, do = make_qkv((1, heads[0], T, T, 4, 6), dtype)
    _, k, v, _ = make_qkv((1, heads[1], T, T, 4, 6), dtype, seed=1)
    return [x[0].transpose(0, 1).contiguous() for x in (q, k, v, do)]


def cu_seqlens(dtype=torch.int32):
    return torch.tensor(BOUNDS, dtype=dtype, device=DEVICE)


def attend(variant, q, k, v, impl, **options):
    if variant.normalizer is None:
        return simple_la(q, k, v, feature_map=variant.feature_map, impl=impl, **options)
    options.update(feature_map=variant.feature_map, normalizer=variant.normalizer)
    return linear_attn(q, k, v, eps=variant.eps, impl=impl, **options)


def one_by_one(variant, q, k, v, impl, rotary=None, key_weight=None, key_mask=None):
    """Each sequence as a batch of one in a call of its own."""
    results = []
    for start, end in pairwise(BOUNDS):
        options = {}
        if rotary is not None:
            cos, sin = (table[..., start:end, :] for table in rotary[:2])
            options["rotary"] = Rotary(cos, sin, rotary.interleaved)
        if key_weight is not None:
            options["key_weight"] = key_weight[..., start:end][None]
        if key_mask is not None:
            options["key_mask"] = key_mask[start:end][None]
        batch = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        results.append(attend(variant, *batch, impl, **options)[0].transpose(0, 1))
    return torch.cat(results)


def make_options(names, heads, per_head=False):
    generator = torch.Generator(DEVICE).manual_seed(2)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=DEVICE)

    options = {}
    if "rotary" in names:
        angles = rand(heads[0], T, 2) if per_head else rand(T, 2)
        options["rotary"] = Rotary(angles.cos(), angles.sin(), interleaved=not per_head)
    if "key_weight" in names:
        options["key_weight"] = rand(heads[1], T) if per_head else rand(T)
    if "key_mask" in names:
        options["key_mask"] = rand(T) < 0.6
        options["key_mask"][93:] = False  # a sequence without any key
    return options


@each_impl
@each_variant
@pytest.mark.parametrize(
    "heads, index_dtype",
    [((2, 2), torch.int32), ((2, 2), torch.int64), ((4, 2), torch.int64), ((3, 1), torch.int32)],
    ids=str,
)
def test_a_loop_over_sequences(heads, index_dtype, variant, impl):
    q, k, v, _ = make_packed(heads)
    o = attend(variant, q, k, v, impl, cu_seqlens=cu_seqlens(index_dtype))
    assert o.shape == (T, heads[0], 6)
    assert_equations(o, one_by_one(variant, q, k, v, impl))


@each_impl
@pytest.mark.parametrize("variant", [Variant("mean", "elu1", 0.3), Variant(None, "elu1")], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "names", ["rotary", "key_weight", "key_mask", "rotary key_weight key_mask"]
)
def test_options_have_a_row_a_token(names, per_head, variant, impl):
    q, k, v, _ = make_packed()
    options = make_options(names.split(), (2, 2), per_head)
    o = attend(variant, q, k, v, impl, cu_seqlens=cu_seqlens(), **options)
    assert_equations(o, one_by_one(variant, q, k, v, impl, **options))
    assert o.isfinite().all()


# Rotated, relu's features may add up where their denominator is 0: not with elu1's.
@each_impl
@pytest.mark.parametrize(
    "variant", [Variant("mean", "elu1", 0.3), Variant("sum", "elu1"), VARIANTS[-1]], ids=str
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_gradients(heads, variant, impl):
    q, k, v, do = make_packed(heads)
    options = make_options(["rotary", "key_weight", "key_mask"], heads)
    leaves = [q, k, v, options.pop("key_weight")]
    leaves = [x.requires_grad_() for x in leaves]

    def packed(q, k, v, weight):
        return attend(variant, q, k, v, impl, key_weight=weight, cu_seqlens=cu_seqlens(), **options)

    def looped(q, k, v, weight):
        return one_by_one(variant, q, k, v, impl, key_weight=weight, **options)

    actual = torch.autograd.grad(packed(*leaves), leaves, do)
    for x, y in zip(actual, torch.autograd.grad(looped(*leaves), leaves, do), strict=True):
        assert_equations(x, y)


@each_impl
@each_variant
def test_gradcheck(variant, impl):
    q, k, v, _ = (x[:6, :1, :3] for x in make_packed())
    leaves = [(x + 0.1 * x.sign()).detach().requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, 2, 2, 6], device=DEVICE)

    def packed(*qkv, impl):
        return attend(variant._replace(eps=1e-6), *qkv, impl, cu_seqlens=bounds)

    assert_derivatives(packed, leaves, impl)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
def test_every_dtype(variant, dtype, impl):
    q, k, v, _ = make_packed(dtype=dtype)
    o = attend(variant, q, k, v, impl, cu_seqlens=cu_seqlens())
    expected = one_by_one(variant, q, k, v, impl)
    assert o.dtype == dtype
    assert (o - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@each_impl
@each_variant
def test_sequences_do_not_touch(variant, impl):
    q, k, v, _ = make_packed()
    expected = attend(variant, q, k, v, impl, cu_seqlens=cu_seqlens())
    for x in (q, k, v):
        x[6:23] = float("nan")
    o = attend(variant, q, k, v, impl, cu_seqlens=cu_seqlens())
    assert o[6:23].isnan().all()
    for rows in (slice(0, 6), slice(23, T)):
        assert torch.equal(o[rows], expected[rows])


@each_impl
@each_variant
def test_one_sequence_is_a_batch_of_one(variant, impl):
    q, k, v, _ = make_packed()
    bounds = torch.tensor([0, T], device=DEVICE)
    o = attend(variant, q, k, v, impl, cu_seqlens=bounds)
    batch = attend(variant, *(x.transpose(0, 1)[None] for x in (q, k, v)), impl)
    assert_equations(o, batch[0].transpose(0, 1))


@each_impl
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_no_tokens(bounds, impl):
    q, k, v = (torch.zeros(0, 3, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    o = linear_attn(q, k, v, cu_seqlens=torch.tensor(bounds, device=DEVICE), impl=impl)
    assert o.shape == (0, 3, 4)
    for gradient in torch.autograd.grad(o.sum(), (q, k, v)):
        assert gradient.shape == (0, 3, 4)


@each_impl
def test_memory_order_is_that_of_the_query(impl):
    q, k, v, _ = make_packed()
    o = linear_attn(q, k, v, feature_map="elu1", cu_seqlens=cu_seqlens(), impl=impl)
    assert o.is_contiguous()
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    head_major = linear_attn(q, k, v, feature_map="elu1", cu_seqlens=cu_seqlens(), impl=impl)
    assert head_major.transpose(0, 1).is_contiguous()
    assert_equations(head_major, o)


@each_impl
def test_slices_of_a_packed_qkv(impl):
    q, k, _, _ = make_packed()
    qkv = torch.stack((q, k, k + 1), 1)
    expected = linear_attn(q, k, k + 1, feature_map="elu1", cu_seqlens=cu_seqlens(), impl=impl)
    o = linear_attn(*qkv.unbind(1), feature_map="elu1", cu_seqlens=cu_seqlens(), impl=impl)
    assert_equations(o, expected)


@pytest.mark.parametrize("bounds", [[0, 5, 90], [3, 96], [0, 50, 40, 96], [0, 97]], ids=str)
def test_the_reference_says_where_lengths_are_wrong(bounds):
    q, k, v, _ = make_packed()
    with pytest.raises(ValueError, match=r"rise from 0 to the 96 tokens of q, got \["):
        linear_attn(q, k, v, cu_seqlens=torch.tensor(bounds, device=DEVICE), impl="reference")

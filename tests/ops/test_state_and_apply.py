"""The halves: a state of any keys, joined by +, and queries that read it; together linear_attn."""

import pytest
import torch
from helpers import DEVICE, DTYPES, LAYOUTS, MAPS, assert_derivatives, assert_equations, make_qkv

from fbila import Rotary, State, linear_attn, linear_attn_apply, linear_attn_state

IMPLEMENTATIONS = ["reference", "triton"]
SHAPE = (2, 3, 5, 7, 4, 6)  # B, H, N, M, K, V

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_normalizer = pytest.mark.parametrize("normalizer", ["mean", "sum"])


def rand(*shape):
    generator = torch.Generator(DEVICE).manual_seed(4)
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=DEVICE)


def make_tables(H, N, K, interleaved=True):
    angles = 3 * rand(H, N, K // 2)
    return Rotary(angles.cos(), angles.sin(), interleaved)


def turned(x, tables):
    """K = 4: channels 0 and 1, 2 and 3 are pairs of complex numbers; else 0 and 2, 1 and 3."""
    order = [0, 1, 2, 3] if tables.interleaved else [0, 2, 1, 3]
    y = x[..., order].unflatten(-1, (2, 2))
    y = torch.view_as_complex(y.contiguous()) * torch.complex(tables.cos, tables.sin)
    return torch.view_as_real(y).flatten(-2)[..., order]  # which undoes itself


@each_impl
@pytest.mark.parametrize("feature_map", [None, "elu1", "relu"])
def test_the_sums(feature_map, impl):
    _, k, v, _ = make_qkv(SHAPE, torch.float64)
    weight, mask = rand(2, 3, 7), rand(2, 7) < 0.6
    state = linear_attn_state(
        k, v, feature_map=feature_map, key_weight=weight, key_mask=mask, impl=impl
    )
    g = MAPS[feature_map](k)
    for b in range(2):
        kept = [j for j in range(7) if mask[b, j]]
        assert state.count[b] == len(kept)
        for h in range(3):
            terms = [weight[b, h, j] * torch.outer(g[b, h, j], v[b, h, j]) for j in kept]
            assert_equations(state.kv[b, h], sum(terms))
            assert_equations(state.key_sum[b, h], sum(weight[b, h, j] * g[b, h, j] for j in kept))


@each_impl
def test_rotary_turns_kv_alone(impl):
    _, k, v, _ = make_qkv(SHAPE, torch.float64)
    tables = make_tables(3, 7, 4)
    state = linear_attn_state(k, v, rotary=tables, impl=impl)
    assert_equations(state.kv, turned(k, tables).transpose(-1, -2) @ v)
    assert_equations(state.key_sum, k.sum(-2))


@each_impl
@each_dtype
@each_normalizer
@pytest.mark.parametrize("names", ["", "rotary", "key_weight", "key_mask", "all"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=str)
def test_together_they_are_linear_attn(heads, names, normalizer, dtype, impl):
    q, _, _, _ = make_qkv((2, heads[0], 7, 7, 4, 6), dtype)
    _, k, v, _ = make_qkv((2, heads[1], 7, 7, 4, 6), dtype, seed=1)
    tables = Rotary(*(x[0] for x in make_tables(1, 7, 4)[:2]))
    options = {"rotary": tables, "key_weight": rand(2, heads[1], 7), "key_mask": rand(2, 7) < 0.6}
    if names != "all":
        options = {name: value for name, value in options.items() if name == names}
    both = {"feature_map": "elu1", "impl": impl}
    state = linear_attn_state(k, v, **both, **options)
    if "rotary" in options:
        both["rotary"] = options["rotary"]
    o = linear_attn_apply(q, state, eps=0.1, normalizer=normalizer, **both)
    whole = linear_attn(q, k, v, eps=0.1, normalizer=normalizer, **{**both, **options})
    assert o.dtype == whole.dtype == dtype
    assert (o - whole).abs().max() <= 4 * torch.finfo(dtype).eps * whole.abs().max()


@each_impl
@each_dtype
def test_sums_are_float32_at_least(dtype, impl):
    q, k, v, _ = make_qkv(SHAPE, dtype)
    state = linear_attn_state(k, v, feature_map="elu1", impl=impl)
    wide = torch.promote_types(dtype, torch.float32)
    assert isinstance(state, State)
    assert [x.dtype for x in state] == [wide] * 3
    assert [tuple(x.shape) for x in state] == [(2, 3, 4, 6), (2, 3, 4), (2,)]
    assert state.count.tolist() == [7, 7]
    assert linear_attn_apply(q, state, feature_map="elu1", impl=impl).dtype == dtype


@each_impl
@each_normalizer
def test_states_of_disjoint_keys_add_up(normalizer, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    tables, weight, mask = make_tables(3, 7, 4), rand(2, 7), rand(2, 7) < 0.6
    total = None
    for keys in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)):
        part = linear_attn_state(
            k[:, :, keys],
            v[:, :, keys],
            feature_map="elu1",
            rotary=Rotary(tables.cos[:, keys], tables.sin[:, keys]),
            key_weight=weight[:, keys],
            key_mask=mask[:, keys],
            impl=impl,
        )
        total = part if total is None else total + part
    whole = linear_attn_state(
        k, v, feature_map="elu1", rotary=tables, key_weight=weight, key_mask=mask, impl=impl
    )
    assert isinstance(total, State)
    for x, y in zip(total, whole, strict=True):
        assert_equations(x, y)
    options = {"feature_map": "elu1", "normalizer": normalizer, "eps": 0.1, "impl": impl}
    assert_equations(linear_attn_apply(q, total, **options), linear_attn_apply(q, whole, **options))


@each_impl
def test_only_a_state_of_the_same_sizes_can_be_added(impl):
    _, k, v, _ = make_qkv(SHAPE, torch.float64)
    state = linear_attn_state(k, v, impl=impl)
    for other in ((1, 2, 3), tuple(state), 0, None, state.kv):
        with pytest.raises(TypeError, match="A State can be added to a State alone, got"):
            state + other
    for other in ((1, 2, 3), 0):
        with pytest.raises(TypeError, match="A State can be added to a State alone, got"):
            other + state
    with pytest.raises(ValueError, match=r"got kv of \(2, 3, 4, 6\) .* and \(1, 3, 4, 6\)"):
        state + linear_attn_state(k[:1], v[:1], impl=impl)
    with pytest.raises(ValueError, match=r"torch.float64 and \(2, 3, 4, 6\) torch.float32"):
        state + linear_attn_state(k.float(), v.float(), impl=impl)


@each_impl
@each_normalizer
@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_and_keys_at_other_positions(interleaved, normalizer, impl):
    # N != M: each side has tables of its own.
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    of_q, of_k = make_tables(3, 5, 4, interleaved), make_tables(3, 7, 4, interleaved)
    state = linear_attn_state(k.exp(), v, rotary=of_k, impl=impl)
    o = linear_attn_apply(q.exp(), state, rotary=of_q, normalizer=normalizer, eps=0.1, impl=impl)
    weights = turned(q.exp(), of_q) @ turned(k.exp(), of_k).transpose(-1, -2)
    denominator = (q.exp() @ k.exp().transpose(-1, -2)).sum(-1, keepdim=True)
    expected = weights @ v / (denominator + (0.7 if normalizer == "mean" else 0.1))
    assert_equations(o, expected)


@each_impl
@each_normalizer
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_without_keys_it_is_zero(eps, normalizer, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    options = {"feature_map": "elu1", "impl": impl}
    for keys, mask in ((0, None), (7, torch.zeros(2, 7, dtype=torch.bool, device=DEVICE))):
        state = linear_attn_state(k[:, :, :keys], v[:, :, :keys], key_mask=mask, **options)
        assert not any(x.any() for x in state)
        assert not linear_attn_apply(q, state, eps=eps, normalizer=normalizer, **options).any()


@each_impl
@pytest.mark.parametrize("feature_map", [None, "elu1", "relu"])
def test_gradcheck_of_the_state(feature_map, impl):
    _, k, v, _ = make_qkv((1, 2, 3, 4, 4, 2), torch.float64, away_from_zero=True)
    tables, mask = make_tables(2, 4, 4), torch.tensor([[1, 0, 1, 1]], device=DEVICE).bool()

    def sums(k, v, key_weight, impl):
        options = {"feature_map": feature_map, "rotary": tables, "key_mask": mask, "impl": impl}
        return linear_attn_state(k, v, key_weight=key_weight, **options)[:2]

    assert_derivatives(sums, [x.requires_grad_() for x in (k, v, rand(1, 2, 4))], impl)


@each_impl
@each_normalizer
@pytest.mark.parametrize("feature_map", ["elu1", "relu"])
def test_gradcheck_of_apply(feature_map, normalizer, impl):
    q, _, _, _ = make_qkv((1, 4, 3, 4, 4, 2), torch.float64, away_from_zero=True)
    tables, count = Rotary(*(x[0] for x in make_tables(1, 3, 4)[:2])), rand(1) + 3

    def apply(q, kv, key_sum, impl):
        options = {"feature_map": feature_map, "normalizer": normalizer, "rotary": tables}
        return linear_attn_apply(q, State(kv, key_sum, count), impl=impl, **options)

    leaves = [x.requires_grad_() for x in (q, rand(1, 2, 4, 2), rand(1, 2, 4) + 0.5)]
    assert_derivatives(apply, leaves, impl)


@each_impl
def test_gradients_go_through_both_halves(impl):
    q, k, v, do = make_qkv(SHAPE, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"feature_map": "elu1", "impl": impl}
    left = linear_attn_state(k[:, :, :3], v[:, :, :3], **options)
    right = linear_attn_state(k[:, :, 3:], v[:, :, 3:], **options)
    o = linear_attn_apply(q, left + right, **options)
    actual = torch.autograd.grad(o, leaves, do)
    expected = torch.autograd.grad(linear_attn(*leaves, **options), leaves, do)
    for x, y in zip(actual, expected, strict=True):
        assert_equations(x, y)


@each_impl
def test_memory_order_is_that_of_the_query(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    state = linear_attn_state(*(LAYOUTS["token_major"](x) for x in (k, v)), impl=impl)
    assert all(x.is_contiguous() for x in state)
    assert linear_attn_apply(q, state, impl=impl).is_contiguous()
    o = linear_attn_apply(LAYOUTS["token_major"](q), state, impl=impl)
    assert o.transpose(1, 2).is_contiguous()


@each_impl
def test_autocast_casts_the_inputs_and_leaves_the_state(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    low, options = DTYPES[-1], {"feature_map": "elu1", "impl": impl}
    with torch.autocast(DEVICE, dtype=low):
        state = linear_attn_state(k, v, **options)
        o = linear_attn_apply(q, state, **options)
    expected = linear_attn_state(k.to(low), v.to(low), **options)
    assert o.dtype == low and state.kv.dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(state, expected, strict=True))
    assert torch.equal(o, linear_attn_apply(q.to(low), expected, **options))

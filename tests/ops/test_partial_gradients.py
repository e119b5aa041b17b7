"""Gradients: those that are asked for, once, keeping nothing that grows with the tokens."""

from itertools import product

import pytest
import torch
from helpers import MEAN, VARIANTS, make_qkv, run

from fbila import focused_la, linear_attn_apply, linear_attn_state

SUBSETS = [s for s in product([False, True], repeat=3) if any(s)]

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)


@each_variant
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_subsets(variant, wanted):
    q, k, v, do = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    expected = run(variant, q, k, v, do)[1:]
    leaves = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
    variant(*leaves).backward(do)
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@each_variant
def test_without_gradients_nothing_is_recorded(variant):
    q, k, v, _ = make_qkv((1, 2, 5, 7, 4, 4), torch.float32)
    expected = variant(q, k, v)
    assert not expected.requires_grad
    q.requires_grad_()
    with torch.no_grad():
        assert not variant(q, k, v).requires_grad
    with torch.inference_mode():
        assert torch.equal(variant(q, k, v), expected)
    assert variant(q, k, v).requires_grad


def test_keys_are_left_alone_when_only_the_query_learns(launches):
    q, k, v, do = make_qkv((1, 2, 5, 7, 4, 4), torch.float32)
    state, inverse = q.new_empty(2, 4 * 4 + 4), q.new_empty(1, 2, 5)
    options = ("none", "mean", "none", 1.0, 1e-6)
    torch.ops.fbila.linear_attn_backward(
        do, q, k, v, *[None] * 5, state, inverse, *options, [True, False]
    )
    assert launches == ["fbila.ops.kernels.grad_query.launch_grad_query"]


def saved_besides_the_inputs(variant, N, M):
    tensors = [x.requires_grad_() for x in make_qkv((1, 2, N, M, 16, 8), torch.float32)[:3]]
    inputs = {x.data_ptr() for x in tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        variant(*tensors)
    assert inputs <= {x.data_ptr() for x in saved}
    return sum(x.numel() for x in saved if x.data_ptr() not in inputs)


@each_variant
def test_little_is_kept(variant):
    """The state, and one number a query and head where there is a denominator."""
    for N, M in ((5, 7), (50, 600)):
        inverse = 0 if variant.normalizer is None else 2 * N
        assert saved_besides_the_inputs(variant, N, M) == 2 * (16 * 8 + 16) + inverse


@each_variant
def test_second_derivatives_are_refused(variant):
    q, k, v, _ = make_qkv((1, 1, 5, 7, 4, 4), torch.float32)
    q.requires_grad_()
    (dq,) = torch.autograd.grad((variant(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        dq.sum().backward()


@each_variant
def test_second_derivatives_are_refused_for_a_constant_gradient(variant):
    # A gradient penalty whose first loss is linear in o: it must not vanish in silence.
    q, k, v, _ = make_qkv((1, 1, 5, 7, 4, 4), torch.float32)
    q.requires_grad_()
    o = variant(q, k, v)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        (o.sum() + (dq**2).sum()).backward()


def by_halves(q, k, v):
    state = linear_attn_state(k, v, feature_map="elu1", impl="triton")
    return linear_attn_apply(q, state, feature_map="elu1", impl="triton")


def focused(q, k, v):
    return focused_la(q, k, v, impl="triton")


@pytest.mark.parametrize("variant", [MEAN, by_halves, focused])
def test_checkpointing_gives_the_same_gradients(variant):
    q, k, v, do = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    expected = run(variant, q, k, v, do)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(variant, *tensors, use_reentrant=False)

    for x, y in zip(run(checkpointed, q, k, v, do), expected, strict=True):
        assert torch.equal(x, y)


def test_two_backward_passes_add_up():
    q, k, v, do = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    expected = run(MEAN, q, k, v, do)[1]
    q.requires_grad_()
    o = MEAN(q, k, v)
    o.backward(do, retain_graph=True)
    o.backward(do)
    assert torch.equal(q.grad, 2 * expected)

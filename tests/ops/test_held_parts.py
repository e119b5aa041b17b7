"""Gradients of parts that somebody else holds, changes or asks for, and parts that were moved."""

import pytest
import torch
from helpers import DEVICE

import fbila
from fbila.ops.parts import parts

from .parts_by_kernels import attend, draw, heads_of, serve_all


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve_all(monkeypatch)


def test_a_gradient_that_somebody_holds_is_not_written_over():
    whole = draw(2, 70, 48).requires_grad_()
    q, k, v = parts(whole, (16, 16, 16))
    y = attend(q, k, v)
    first, second = draw(2, 70, 16, seed=1), draw(2, 70, 16, seed=2)
    (held,) = torch.autograd.grad(y, q, first, retain_graph=True)
    kept = held.clone()
    (again,) = torch.autograd.grad(y, q, second, retain_graph=True)
    (dwhole,) = torch.autograd.grad(y, whole, second)
    assert torch.equal(held, kept) and not torch.equal(again, kept)
    assert torch.equal(dwhole[..., :16], again)


def test_a_gradient_that_looks_like_a_place_is_left_alone():
    """A slice of somebody's tensor, which lies there as that of the whole does."""
    whole = draw(2, 30, 48).requires_grad_()
    theirs = draw(2, 30, 48, seed=1)
    before = theirs.clone()
    q, _, v = parts(whole, (16, 16, 16))
    torch.autograd.backward((q, v), (theirs[..., :16], theirs[..., 32:]))
    assert torch.equal(theirs, before)
    assert torch.equal(whole.grad[..., 16:32], torch.zeros(2, 30, 16, device=DEVICE))
    assert torch.equal(whole.grad[..., :16], theirs[..., :16])


def test_gradients_that_are_asked_for_beside_that_of_the_whole():
    """Of a part that is used twice it is the sum, of its views what came by them."""
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    found = []
    for x, split in ((whole, parts), (plain, lambda x, sizes, twice: (*x.split(sizes, -1), None))):
        q, k, v, again = split(x, (16, 16, 16), twice=(2,))
        views = [heads_of(part, 2) for part in (q, k, v)]
        out = fbila.linear_attn(*views, feature_map="elu1", impl="triton")
        loss = out.square().sum() + (v if again is None else again).sin().square().sum()
        found.append(torch.autograd.grad(loss, [q, k, *views, x]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_hook_keeps_is_not_written_over():
    """Of a view, where the next hook has another gradient in the place of what came."""
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    kept = []
    for x, split in ((whole, parts), (plain, lambda x, sizes: x.split(sizes, -1))):
        q, k, v = (part for part in split(x, (16, 16, 16)))
        view = heads_of(k, 2)
        view.register_hook(lambda dk: kept.append((dk, dk.clone())))
        k.register_hook(lambda dk: 3 * dk)
        out = fbila.linear_attn(heads_of(q, 2), view, heads_of(v, 2), impl="triton")
        out.square().sum().backward()
    assert torch.equal(whole.grad, plain.grad)
    for now, then in kept:
        assert torch.equal(now, then)


def test_gradients_that_change_places():
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    for x, split in ((whole, parts), (plain, lambda x, sizes: x.split(sizes, -1))):
        q, k, v = split(x, (16, 16, 16))
        node = q.grad_fn
        node.register_prehook(lambda grads: (grads[1], grads[0], *grads[2:]))
        attend(q, k, v).square().sum().backward()
    assert torch.equal(whole.grad, plain.grad)


def test_a_part_that_was_moved_has_no_place():
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    q, k, v = parts(whole, (16, 16, 16))
    q.data = q.data.clone()
    attend(q, k, v).square().sum().backward()
    attend(*plain.split(16, -1)).square().sum().backward()
    assert torch.equal(whole.grad, plain.grad)


def test_backward_passes_called_by_hand():
    """Outside the engine, where one cannot be told from the next."""
    whole = draw(2, 70, 48).requires_grad_()
    y = attend(*parts(whole, (16, 16, 16)))
    node = y.grad_fn
    while "LinearAttn" not in node.name():
        node = node.next_functions[0][0]
    first, second = (heads_of(draw(2, 70, 16, seed=seed), 2) for seed in (1, 2))
    held = node.apply(first)[0]
    kept = held.clone()
    node.apply(second)
    assert torch.equal(held, kept)


def test_hooks_are_heard():
    whole = draw(2, 30, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    q, k, v = parts(whole, (16, 16, 16))
    k.register_hook(lambda dk: 3 * dk)
    attend(q, k, v).square().sum().backward()
    q, k, v = plain.split(16, -1)
    k.register_hook(lambda dk: 3 * dk)
    attend(q, k, v).square().sum().backward()
    assert torch.equal(whole.grad, plain.grad)

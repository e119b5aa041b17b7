"""Parts of a projection, whose gradients are written where that of the whole has them."""

import pytest
import torch
from helpers import DEVICE, DTYPES, LOW

import fbila
from fbila.ops import library
from fbila.ops import parts as module
from fbila.ops.parts import parts

from .parts_by_kernels import attend, copies_of, draw, heads_of, serve_all

KINDS = [*DTYPES, torch.float64]


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve_all(monkeypatch)


@pytest.fixture
def copied(monkeypatch):
    return copies_of(monkeypatch)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (5,), (1, 130, 2, 7), (64, 3)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_gradients_of_parts(dtype, sizes, tokens):
    """Of each alone, and of none for one of them."""
    whole = draw(2, tokens, sum(sizes), dtype=dtype).requires_grad_()
    found = parts(whole, sizes)
    for part, expected in zip(found, whole.split(sizes, -1), strict=True):
        assert torch.equal(part, expected) and part.data_ptr() == expected.data_ptr()
    gradients = [draw(*part.shape, dtype=dtype, seed=i) for i, part in enumerate(found, 1)]
    (dwhole,) = torch.autograd.grad(found, whole, gradients, retain_graph=True)
    assert torch.equal(dwhole, torch.cat(gradients, -1))
    for missing in range(len(sizes)):
        rest = [i for i in range(len(sizes)) if i != missing]
        if rest:
            of_rest = [found[i] for i in rest], whole, [gradients[i] for i in rest]
            (dwhole,) = torch.autograd.grad(*of_rest, retain_graph=True)
            gradients[missing].zero_()
            assert torch.equal(dwhole, torch.cat(gradients, -1))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_two_gradients_of_a_part_are_added(dtype, copied):
    whole = draw(2, 33, 24, dtype=dtype).requires_grad_()
    a, b, c, again = parts(whole, (8, 8, 8), twice=(1,))
    assert torch.equal(again, b)
    gradients = [draw(2, 33, 8, dtype=dtype, seed=i) for i in range(1, 5)]
    (dwhole,) = torch.autograd.grad((a, b, c, again), whole, gradients)
    one, two, three, more = gradients
    assert torch.equal(dwhole, torch.cat((one, two + more, three), -1))
    assert copied == [((66, 8), False), ((66, 8), True), ((66, 8), False)]


def test_gradients_with_holes_between_rows_and_columns():
    whole = draw(3, 10, 16).requires_grad_()
    a, b = parts(whole, (8, 8))
    wide, turned = draw(3, 10, 20, seed=1)[..., 4:12], draw(3, 8, 10, seed=2).mT
    every_other, one = draw(3, 10, 20, seed=3)[..., :16:2], torch.ones((), device=DEVICE)
    for pair in ((wide, turned), (every_other, one.expand(3, 10, 8))):
        (dwhole,) = torch.autograd.grad((a, b), whole, pair, retain_graph=True)
        assert torch.equal(dwhole, torch.cat(pair, -1))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_attention_writes_them_in_place(dtype, copied):
    whole = draw(2, 70, 48, dtype=dtype).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    attend(*parts(whole, (16, 16, 16))).square().sum().backward()
    attend(*plain.split(16, -1)).square().sum().backward()
    assert torch.equal(whole.grad, plain.grad) and whole.grad.is_contiguous()
    assert copied == []


def test_nothing_is_kept_after_a_backward_pass():
    whole = draw(2, 70, 48).requires_grad_()
    q, k, v = parts(whole, (16, 16, 16))
    attend(q, k, v).sum().backward(retain_graph=True)
    assert q.grad_fn.made == (None, None, set())


@pytest.mark.parametrize("shift", [True, False])
def test_focused_attention_writes_them_in_place(shift, copied):
    whole, positions = draw(2, 70, 48).requires_grad_(), draw(2, 70, 8, seed=1).requires_grad_()
    plain, expected = (x.detach().clone().requires_grad_() for x in (whole, positions))
    pairs = ((whole, positions, parts), (plain, expected, lambda x, sizes: x.split(sizes, -1)))
    for x, p, split in pairs:
        q, k, v = (heads_of(part, 2) for part in split(x, (16, 16, 16)))
        options = {"key_positions": p} if shift else {}
        fbila.focused_la(q, k, v, impl="triton", **options).square().sum().backward()
    assert torch.equal(whole.grad, plain.grad)
    assert not shift or torch.equal(positions.grad, expected.grad)
    assert copied == shift * [((140, 16), False)]


@pytest.mark.parametrize("twice", [True, False])
def test_attention_and_another_use_of_the_values(twice, copied):
    """As of a convolution. Not said before, it is seen when the places have been given."""
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    q, k, v, *again = parts(whole, (16, 16, 16), twice=(2,) if twice else ())
    (attend(q, k, v) + (again[0] if again else v).sin()).square().sum().backward()
    q, k, v = plain.split(16, -1)
    (attend(q, k, v) + v.sin()).square().sum().backward()
    torch.testing.assert_close(whole.grad, plain.grad)
    assert copied == ([((140, 16), True)] if twice else 3 * [((140, 16), False)])


def test_two_attentions_of_the_same_parts(copied):
    """The second has memory of its own, or it would write over the first's."""
    whole = draw(2, 70, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    for x, split in ((whole, parts), (plain, lambda x, sizes: x.split(sizes, -1))):
        q, k, v = split(x, (16, 16, 16))
        (attend(q, k, v) + 2 * attend(q, k, v, heads=4)).square().sum().backward()
    torch.testing.assert_close(whole.grad, plain.grad)
    assert len(copied) == 3


def test_keys_of_another_projection(copied):
    of_q, of_kv = draw(2, 30, 24).requires_grad_(), draw(2, 50, 32, seed=1).requires_grad_()
    plain = [x.detach().clone().requires_grad_() for x in (of_q, of_kv)]
    q, _ = parts(of_q, (16, 8))
    attend(q, *parts(of_kv, (16, 16))).square().sum().backward()
    attend(plain[0][..., :16], *plain[1].split(16, -1)).square().sum().backward()
    assert torch.equal(of_q.grad, plain[0].grad) and torch.equal(of_kv.grad, plain[1].grad)
    assert copied == []


def test_traced_symbolically():
    class Module(torch.nn.Module):
        def forward(self, x):
            a, b, again = parts(x, 2, twice=(1,))[:3]
            return a + b * again

    class Two(torch.nn.Module):
        def forward(self, x):
            a = parts(x, (5, 7))
            return a[0].sum() + a[1].sum()

    x = draw(3, 12)
    for traced in (Module(), Two()):
        torch.testing.assert_close(torch.fx.symbolic_trace(traced)(x), traced(x))


@pytest.mark.parametrize("frozen", ["q", "keys"])
def test_what_needs_no_gradient(frozen):
    """Parts beside tensors that have none."""
    whole = draw(2, 30, 32).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    other = draw(2, 30, 16, seed=1)
    for x, split in ((whole, parts), (plain, lambda x, sizes: x.split(sizes, -1))):
        a, b = split(x, (16, 16))
        mixed = attend(other, a, b) if frozen == "q" else attend(a, other, other) * b
        mixed.square().sum().backward()
    torch.testing.assert_close(whole.grad, plain.grad)


def test_part_of_a_part_has_no_place():
    """Of some heads, or of some tokens, of which the rest belongs to somebody else."""
    whole = draw(2, 30, 48).requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    for x, split in ((whole, parts), (plain, lambda x, sizes: x.split(sizes, -1))):
        q, k, v = split(x, (16, 16, 16))
        few = attend(q[..., :8], k[..., :8], v[..., :8], heads=1)
        late = attend(q[:, 10:], k[:, 10:], v[:, 10:])
        (few.square().sum() + late.square().sum()).backward()
    torch.testing.assert_close(whole.grad, plain.grad)


def test_gradients_of_gradients_are_those_of_pytorch():
    whole = draw(2, 5, 12, dtype=torch.float64).requires_grad_()

    def product(x):
        a, b, again = parts(x, (6, 6), twice=(1,))
        return a * b + again**3

    assert torch.autograd.gradcheck(product, whole)
    assert torch.autograd.gradgradcheck(product, whole)


def test_small_wholes_and_other_orders_are_split_by_pytorch(monkeypatch):
    whole = draw(2, 30, 48).requires_grad_()
    turned = draw(2, 48, 30).mT.requires_grad_()
    assert all("Split" in x.grad_fn.name() for x in parts(turned, (16, 32)))
    monkeypatch.setattr(module, "FEWEST", whole.numel() + 1)
    a, b, again = parts(whole, (16, 32), twice=(1,))
    assert "Split" in a.grad_fn.name() and again is b


def test_only_wanted_weights_have_gradients(copied):
    """Of a weight for each key, which is no part."""
    whole = draw(2, 30, 48).requires_grad_()
    weight = draw(2, 2, 30, seed=3).exp().requires_grad_()
    plain = whole.detach().clone().requires_grad_()
    expected = weight.detach().clone().requires_grad_()
    pairs = ((whole, weight, parts), (plain, expected, lambda x, sizes: x.split(sizes, -1)))
    for x, w, split in pairs:
        q, k, v = (heads_of(part, 2) for part in split(x, (16, 16, 16)))
        out = fbila.linear_attn(q, k, v, feature_map="elu1", key_weight=w, impl="triton")
        out.square().sum().backward()
    assert torch.equal(whole.grad, plain.grad) and torch.equal(weight.grad, expected.grad)
    assert copied == []


def test_empty_parts():
    whole = draw(2, 0, 48).requires_grad_()
    attend(*parts(whole, (16, 16, 16))).sum().backward()
    assert whole.grad.shape == whole.shape


def test_the_pass_into_places_is_that_of_its_own_memory():
    q, k, v, do = (draw(2, 2, 30, 8, seed=i) for i in range(4))
    options = ("elu1", "mean", "none", 1.0, 1e-6)
    inputs = (q, k, v, None, None, None, None, None)
    _, state, inverse = library.forward(*inputs, *options)
    arguments = (do, *inputs, state, inverse, *options, [True, True])
    *expected, _ = library.backward(*arguments)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    library.backward_into(*arguments, *found)
    assert all(map(torch.equal, found, expected))

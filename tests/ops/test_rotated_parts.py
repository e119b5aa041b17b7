"""Queries and keys of a projection rotated by kernels, and gradients of all its parts."""

import pytest
import torch
from helpers import DEVICE, DTYPES, LOW, passes_made

from fbila.ops import rotated_parts as library
from fbila.ops.autograd import ordinary
from fbila.ops.kernels import rotated_parts as kernels
from fbila.ops.rotary import Rotary, rotate
from fbila.ops.rotated_parts import _RotatedParts, backward_by_pytorch, rotated_parts

KINDS = [*DTYPES, torch.float64]
# B, N, heads, d.
SHAPES = [
    *((2, N, heads, d) for N in (1, 7, 196) for heads, d in ((1, 4), (5, 32), (5, 64), (1, 64))),
    *((1, 49, 3, 20), (3, 33, 3, 48), (2, 5, 3, 2)),
]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def tables(N, d, dtype=torch.float32, seed=9):
    angles = 9 * draw(N, d // 2, dtype=torch.float64, seed=seed)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def problem(shape=(2, 7, 3, 8), dtype=torch.float32):
    """A leaf, tables, and gradients of the four parts."""
    B, N, heads, d = shape
    whole = draw(B, N, 4, heads, d, dtype=dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    return whole, tables(N, d, wide), [draw(*shape, dtype=dtype, seed=i) for i in range(1, 5)]


def turned(x, cos, sin):
    """x `(B, N, heads, d)`, token by token and pair by pair."""
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    y = torch.empty_like(x)
    y[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    y[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
    return y


def near(actual, expected, read):
    """read: What was turned, to the length of whose pairs roundings are relative."""
    limits = torch.finfo(actual.dtype)
    length = read.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    eps = limits.eps / 2 if actual.dtype.itemsize == 2 else 2 * limits.eps
    # And what is computed in float32, and the step of subnormal numbers.
    bound = (eps + 2.0**-21 * (actual.dtype.itemsize == 2)) * length
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound + limits.smallest_normal * eps).all()


def check(whole, pair, gradients, run=_RotatedParts.apply):
    """Parts and gradients, which are returned."""
    cos, sin = pair
    found = run(whole, *pair)
    values = whole.detach()
    for i, part in enumerate(found):
        assert part.dtype == whole.dtype
        if i < 2:
            near(part, turned(values[:, :, i], cos, sin), values[:, :, i])
            assert part.is_contiguous()
        else:
            assert torch.equal(part, values[:, :, i])
            assert part.data_ptr() == whole[:, :, i].data_ptr()
            assert part.stride() == whole[:, :, i].stride()
    (dwhole,) = torch.autograd.grad(found, whole, gradients)
    assert dwhole.dtype == whole.dtype and dwhole.is_contiguous()
    for i, gradient in enumerate(gradients):
        if i < 2:
            near(dwhole[:, :, i], turned(gradient, cos, -sin), gradient)
        else:
            assert torch.equal(dwhole[:, :, i], gradient)
    return *found, dwhole


def of_tables(whole, *pair):
    return rotated_parts(whole, Rotary(*pair))


@pytest.fixture
def launched(monkeypatch):
    """The names of the passes that kernels have made."""
    return passes_made(monkeypatch, library)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_and_gradients(shape, dtype):
    check(*problem(shape, dtype))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_they_are_pytorchs_but_for_a_rounding(launched, dtype, monkeypatch):
    whole, pair, gradients = problem((2, 49, 5, 64), dtype)
    found = check(whole, pair, gradients, of_tables)
    assert launched == ["in_kernel", "backward_in_kernel"]
    monkeypatch.setattr(library, "direct", lambda *_: False)
    expected = check(whole, pair, gradients, of_tables)
    assert len(launched) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_large_numbers_do_not_overflow_before_they_are_rounded():
    dtype = LOW[-1]
    whole, pair, gradients = problem(dtype=dtype)
    scale = torch.finfo(dtype).max / 8
    whole = (whole.detach() * (scale / whole.detach().abs().max())).requires_grad_()
    check(whole, pair, gradients)


def test_gradients_that_lie_otherwise():
    whole, pair, gradients = problem()
    turned_over = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in gradients]
    expanded = [g[:, :1, :, :1].expand_as(g) for g in gradients]
    for given in (turned_over, expanded, [*turned_over[:2], *gradients[2:]], [gradients[0]] * 4):
        check(whole, pair, given)


@pytest.mark.parametrize("missing", range(4))
def test_parts_that_nothing_is_made_of(missing):
    whole, pair, gradients = problem()
    *_, expected = check(whole, pair, gradients)
    read = [i for i in range(4) if i != missing]
    parts = _RotatedParts.apply(whole, *pair)
    (found,) = torch.autograd.grad([parts[i] for i in read], whole, [gradients[i] for i in read])
    assert not found[:, :, missing].any()
    assert torch.equal(found[:, :, read], expected[:, :, read])


def test_tables_that_are_not_contiguous():
    whole, (cos, sin), gradients = problem()
    check(whole, (cos.mT.contiguous().mT, sin.repeat_interleave(2, 1)[:, ::2]), gradients)


def test_blocks_share_tables_and_each_its_own():
    """Of one shape and of another, one after another and again."""
    first, second = problem(), problem((2, 7, 2, 8))
    others = tables(7, 8, seed=10)
    for whole, pair, gradients in (first, second, first):
        for given in (pair, others, pair[::-1]):
            check(whole, given, gradients)


def test_nothing_but_the_tables_is_kept():
    whole, pair, gradients = problem()
    *_, expected = check(whole, pair, gradients)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _RotatedParts.apply(whole, *pair)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in pair]
    q, k, v, gate = _RotatedParts.apply(whole, *pair)
    q.mul_(2)
    (found,) = torch.autograd.grad((q, k, v, gate), whole, [gradients[0] / 2, *gradients[1:]])
    assert torch.equal(found, expected)
    k = _RotatedParts.apply(whole, *pair)[1]
    pair[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        k.sum().backward()


def test_views_are_not_changed_in_place(launched, monkeypatch):
    """As those of a split."""
    whole, pair, _ = problem()
    for way in (ordinary, lambda *_: False):
        monkeypatch.setattr(library, "direct", way)
        for part in of_tables(whole * 1, *pair)[2:]:
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                part.mul_(2)
    assert launched == ["in_kernel"]


def test_the_same_bits_every_time():
    given = problem((2, 49, 5, 64))
    expected = check(*given)
    for _ in range(2):
        assert all(map(torch.equal, check(*given), expected))


def test_gradients_of_gradients(launched):
    whole, pair, _ = problem((2, 3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x: of_tables(x, *pair), whole)
    assert torch.autograd.gradgradcheck(lambda x: of_tables(x, *pair), whole)
    launched.clear()
    # Rotations keep lengths: the sum of squares has the gradient 2 x, and that of its own 8 x.
    parts = of_tables(whole, *pair)
    (first,) = torch.autograd.grad(sum(p.square().sum() for p in parts), whole, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), whole)
    torch.testing.assert_close(first, 2 * whole)
    torch.testing.assert_close(second, 8 * whole)
    assert launched == ["in_kernel", "backward_in_kernel"]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_gradients_by_pytorch_are_the_same(monkeypatch, dtype):
    monkeypatch.setattr(library, "backward_in_kernel", backward_by_pytorch)
    check(*problem(dtype=dtype))


def test_many_gradients_at_once():
    whole, pair, gradients = problem()
    parts = _RotatedParts.apply(whole, *pair)
    (expected,) = torch.autograd.grad(parts, whole, gradients, retain_graph=True)
    both = [torch.stack((g, 2 * g)) for g in gradients]
    (found,) = torch.autograd.grad(parts, whole, both, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack((expected, 2 * expected)))


def test_one_launch_in_inference(launched):
    whole, pair, gradients = problem()
    expected = check(whole, pair, gradients)
    launched.clear()
    for run in (torch.no_grad(), torch.inference_mode()):
        with run:
            for found, one in zip(of_tables(whole, *pair), expected[:4], strict=True):
                assert torch.equal(found, one) and found.stride() == one.stride()
    of_tables(whole.detach(), *pair)
    assert launched == 3 * ["in_kernel"]


def test_what_kernels_do_not_take_is_pytorchs(launched):
    whole, (cos, sin), gradients = problem()
    plain = Rotary(cos, sin)
    halves = Rotary(cos, sin, interleaved=False)
    learned = Rotary(cos.clone().requires_grad_(), sin)
    with torch.inference_mode():
        inference = Rotary(cos.clone(), sin.clone())
    strided = whole.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    padded = torch.cat((whole, whole), -1).detach()[..., :8].requires_grad_()
    double = Rotary(cos.double(), sin.double())
    for x, rotary in (
        (whole, halves),
        (whole, learned),
        (whole, inference),
        (whole, double),
        (whole, Rotary(cos[:1], sin[:1])),
        (whole, Rotary(cos[:, :1], sin[:, :1])),
        (strided, plain),
        (padded, plain),
    ):
        parts = rotated_parts(x, rotary)
        wide = Rotary(*(t.detach().double().unsqueeze(1) for t in rotary[:2]), rotary.interleaved)
        (dx,) = torch.autograd.grad(parts, x, gradients)
        exact = x.detach().double().requires_grad_()
        expected = [*(rotate(exact[:, :, i], wide) for i in (0, 1)), exact[:, :, 2], exact[:, :, 3]]
        (expected_dx,) = torch.autograd.grad(expected, exact, [g.double() for g in gradients])
        for found, one in zip((*parts, dx), (*expected, expected_dx), strict=True):
            torch.testing.assert_close(found.double(), one.double(), rtol=1e-5, atol=1e-6)
    empty = whole[:0]
    assert [part.shape for part in rotated_parts(empty, plain)] == 4 * [(0, 7, 3, 8)]
    for transform in (torch.func.grad, torch.func.jacfwd):
        transform(lambda x: sum(p.square().sum() for p in rotated_parts(x, plain)))(whole.detach())
    assert launched == []


def test_compiled_graphs_have_the_formula(launched):
    whole, pair, gradients = problem()
    parts = torch.compile(of_tables, backend="aot_eager", fullgraph=True)(whole, *pair)
    (found,) = torch.autograd.grad(parts, whole, gradients)
    assert launched == []
    *expected, dwhole = check(whole, pair, gradients)
    for one, other in zip((*parts, found), (*expected, dwhole), strict=True):
        torch.testing.assert_close(one, other)


def test_a_program_has_an_edge_in_every_direction(monkeypatch):
    for name, value in (("COLUMNS", 16), ("TOKENS", 4)):
        monkeypatch.setattr(kernels, name, value)
    kernels.plan_rotated_parts.cache_clear()
    for shape in ((2, 7, 3, 8), (3, 4, 2, 20), (2, 9, 1, 6)):
        check(*problem(shape))
    kernels.plan_rotated_parts.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_it_is_served_on_a_gpu_also_under_autocast(low):
    for dtype in (low, torch.float32, torch.float64):
        whole, pair, gradients = problem((64, 49, 8, 64), dtype)
        for enabled in (False, True):
            with torch.autocast("cuda", low, enabled=enabled):
                parts = of_tables(whole, *pair)
                assert "_RotatedParts" in type(parts[0].grad_fn).__name__
                check(whole, pair, gradients, of_tables)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    B, N, heads, d = 2**15 + 3, 64, 8, 64
    whole = torch.zeros(B, N, 4, heads, d, dtype=torch.float16, device=DEVICE)
    whole[-1, -1] = torch.arange(1, 5, device=DEVICE)[:, None, None]
    # By a right angle.
    cos, sin = torch.zeros(N, d // 2, device=DEVICE), torch.ones(N, d // 2, device=DEVICE)
    parts = _RotatedParts.apply(whole.requires_grad_(), cos, sin)
    for part, size in zip(parts[:2], (1, 2), strict=True):
        assert (part[-1, -1, :, ::2] == -size).all() and (part[-1, -1, :, 1::2] == size).all()
        assert not part[:-1].any() and not part[-1, :-1].any()
    (dwhole,) = torch.autograd.grad(parts, whole, [part.detach() for part in parts])
    assert torch.equal(dwhole, whole)

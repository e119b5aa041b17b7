"""Linear attention of values about their mean, against its formula with the differences in it."""

import pytest
import torch
from helpers import DEVICE, LOW, MAPS
from torch.library import opcheck

from fbila import simple_la
from fbila.ops import centred_library, functional
from fbila.ops.centred_library import centred_la
from fbila.ops.parts import parts

# The long way, by several programs, and of two tiles; heads of odd widths and wide ones.
LONG, TWO_TILES, NARROW, WIDE = (1100, 4, 4), (70, 40, 80), (33, 5, 7), (40, 160, 130)
# By one kernel, in 16 bits.
SHORT = (70, 16, 24)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    for module in (centred_library, functional):
        monkeypatch.setattr(module, "choose_implementation", lambda *_: "triton")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(dtype, sizes, mean=3.0, B=1, H=2):
    """q, k and v side by side in memory, token-major, and gradients of o and of the mean."""
    N, K, V = sizes
    packed = draw(B, N, H * (2 * K + V))
    packed[..., 2 * H * K :] += mean
    packed = packed.to(DEVICE, dtype)
    inputs = [
        x.unflatten(-1, (H, -1)).transpose(1, 2) for x in packed.split((H * K, H * K, H * V), -1)
    ]
    do, dmean = draw(B, H, N, V, seed=1).to(DEVICE, dtype), draw(B, H, V, seed=2).to(DEVICE, dtype)
    return inputs, (do, dmean)


def results(function, inputs, upstream, feature_map, scale):
    """o, the mean and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves, feature_map, scale)
    gradients = torch.autograd.grad(found, leaves, [dy.to(found[0].dtype) for dy in upstream])
    return [x.detach() for x in (*found, *gradients)]


def exact(q, k, v, feature_map, scale):
    phi = MAPS[feature_map]
    mean = v.mean(2, keepdim=True)
    return scale * phi(q) @ (phi(k).mT @ (v - mean)), mean.squeeze(2)


def by_differences(q, k, v, feature_map, scale):
    mean = v.mean(2, keepdim=True)
    return simple_la(q, k, v - mean, feature_map=feature_map, scale=scale), mean.squeeze(2)


def by_op(q, k, v, feature_map, scale):
    return torch.ops.fbila.centred_la(q, k, v, feature_map or "none", scale)


def errors(found, truth):
    assert [x.shape for x in found] == [x.shape for x in truth]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "feature_map"),
    [(LONG, None), (TWO_TILES, "exp"), (NARROW, "relu"), (WIDE, None), (SHORT, "exp")],
    ids=str,
)
def test_formula_in_float64(sizes, feature_map):
    inputs, upstream = problem(torch.float64, sizes)
    truth = results(exact, inputs, upstream, feature_map, 0.1)
    found = results(by_op, inputs, upstream, feature_map, 0.1)
    assert max(errors(found, truth)) <= 1e-12
    with torch.no_grad():
        o, mean = by_op(*inputs, feature_map, 0.1)
    assert torch.equal(o, found[0]) and torch.equal(mean, found[1])
    # As q, k and v are, which none of them was copied for.
    assert all(x.transpose(1, 2).is_contiguous() for x in (o, *found[2:]))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("feature_map", [None, "relu", "exp"])
@pytest.mark.parametrize("sizes", [(300, 16, 16), SHORT, WIDE], ids=str)
def test_a_large_mean_costs_nothing_in_16_bits(sizes, feature_map, dtype):
    inputs, upstream = problem(dtype, sizes, mean=30.0)
    wide = [x.double() for x in inputs]
    arguments = feature_map, 0.25 / sizes[0]
    truth = results(exact, wide, [x.double() for x in upstream], *arguments)
    found = errors(results(centred_la, inputs, upstream, *arguments), truth)
    before = errors(results(by_differences, inputs, upstream, *arguments), truth)
    assert max(found) <= 2 * torch.finfo(dtype).eps
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(found, before, strict=True))
    # Differences to a rounded mean are wrong by as much for every key.
    assert found[0] < before[0] / 5


@pytest.mark.parametrize("sizes", [NARROW, (300, 16, 16)], ids=str)
def test_a_large_mean_costs_no_more_than_before_in_float32(sizes):
    inputs, upstream = problem(torch.float32, sizes, mean=30.0)
    for ours, theirs in zip(
        results(centred_la, inputs, upstream, None, 0.25),
        results(by_differences, inputs, upstream, None, 0.25),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_by_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(centred_library, "choose_implementation", lambda *_: "reference")
    inputs, upstream = problem(dtype, SHORT, mean=30.0)
    wide = [x.double() for x in inputs]
    truth = results(exact, wide, [x.double() for x in upstream], "relu", 0.1)
    found = results(centred_la, inputs, upstream, "relu", 0.1)
    assert {x.dtype for x in found} == {dtype}
    # In float32 the mean is that much wrong, times the sum of the keys.
    assert max(errors(found, truth)) <= max(torch.finfo(dtype).eps, 1e-4)


def test_gradients_of_parts_are_written_in_place(monkeypatch):
    monkeypatch.setattr("fbila.ops.parts.FEWEST", 0)
    monkeypatch.setattr("fbila.ops.parts.direct", lambda *_: True)
    monkeypatch.setattr(centred_library, "_empty_gradients", None)
    (q, k, v), upstream = problem(torch.float16, SHORT)
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1).requires_grad_()
    truth = results(exact, [q.double(), k.double(), v.double()], upstream, None, 0.1)
    q, k, v = (
        x.unflatten(-1, (2, -1)).transpose(1, 2) for x in parts(packed, (32, 32, 48))
    )  # fmt: skip
    found = centred_la(q, k, v, None, 0.1)
    (gradient,) = torch.autograd.grad(found, packed, upstream)
    expected = torch.cat([x.transpose(1, 2).flatten(2) for x in truth[2:]], -1)
    assert max(errors([gradient], [expected])) <= 1e-3


@pytest.mark.parametrize(("N", "M", "B"), [(5, 0, 1), (0, 5, 1), (5, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_without_tokens(N, M, B, dtype):
    q, k, v = (draw(B, 2, n, 4).to(DEVICE, dtype).requires_grad_() for n in (N, M, M))
    o, mean = by_op(q, k, v, None, 0.1)
    assert o.shape == (B, 2, N, 4) and not o.any()
    expected = v.mean(2) if M else torch.zeros_like(mean)
    torch.testing.assert_close(mean, expected)
    dq, dk, dv = torch.autograd.grad((o.sum() + mean.sum()), (q, k, v))
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv, torch.full_like(dv, 1 / max(M, 1)))


def test_either_result_alone_has_gradients():
    inputs, _ = problem(torch.float64, NARROW)
    leaves = [x.detach().requires_grad_() for x in inputs]
    for i in (0, 1):
        found, truth = (
            torch.autograd.grad(f(*leaves, None, 0.1)[i].square().sum(), leaves, allow_unused=True)
            for f in (by_op, exact)
        )
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_its_gradients_have_none():
    inputs, _ = problem(torch.float64, NARROW)
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, _ = by_op(*leaves, None, 0.1)
    (dq,) = torch.autograd.grad(o.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="centred_la cannot be differentiated twice"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_as_an_op_of_pytorch(dtype):
    inputs, _ = problem(dtype, NARROW)
    leaves = [x.detach().requires_grad_() for x in inputs]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(torch.ops.fbila.centred_la.default, (*leaves, "none", 0.1), test_utils=tests)


def test_heads_that_are_too_wide():
    (q, k, v), _ = problem(torch.float16, (8, 4, 300))
    with pytest.raises(ValueError, match="head_dim up to 256 is supported"):
        centred_la(q, k, v, None, 1.0)
    (q, k, v), _ = problem(torch.float16, (8, 300, 4))
    with pytest.raises(ValueError, match="head_dim up to 256 is supported"):
        centred_la(q, k, v, None, 1.0)

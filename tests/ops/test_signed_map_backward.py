"""The gradients of maps that keep the sign, against PyTorch's autograd in float64."""

import pytest
import torch
from helpers import DTYPES

from fbila.ops import signed_map_backward_library as backward_library
from fbila.ops import signed_map_library
from fbila.ops.kernels import signed_map as kernels
from fbila.ops.kernels import signed_map_backward as backward_kernels
from fbila.ops.signed_map_library import in_kernel, in_pytorch, signed_map

from .test_signed_map import (
    ALL,
    KINDS,
    SHAPES,
    assert_near,
    assert_rounded,
    both_gradients,
    each_map,
    exact,
    problem,
    upstream,
)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@each_map
@both_gradients
def test_gradients_are_exact(gradients, kind, both, shifted, shape, dtype):
    x, addend, table = problem(shape, dtype, kind, both)
    addend = addend if shifted else None
    results, leaves = exact(x, addend, table, kind, both)
    douts = [upstream(x, 3 + i) for i in range(1 + both)]
    found = gradients(douts[0], douts[1] if both else None, x, addend, table, kind, ALL)
    wanted = torch.autograd.grad(results, leaves, [dy.double() for dy in douts])
    dx, *sums = [g for g in found if g.numel()]
    assert dx.dtype == dtype and dx.transpose(1, 2).is_contiguous()
    # What comes from both polarities may cancel.
    (assert_near if both else assert_rounded)(dx, wanted[0])
    for actual, like, expected in zip(sums, (addend, table)[-len(sums) :], wanted[1:], strict=True):
        assert actual.dtype == like.dtype and actual.is_contiguous()
        assert_near(actual, expected)


@pytest.mark.parametrize("expanded", [False, True])
def test_a_gradient_that_is_the_same_for_all(expanded):
    x, addend, table = problem((2, 3, 5, 4), torch.float32, "power", False)
    dy = x.new_ones(()).expand_as(x) if expanded else torch.ones_like(x)
    dx, _, _ = backward_library.in_kernel(dy, None, x, addend, table, "power", ALL)
    results, leaves = exact(x, addend, table, "power", False)
    assert_rounded(dx, torch.autograd.grad(results[0].sum(), leaves[0])[0])


@pytest.mark.parametrize("kind", ["power", "expm1"])
@both_gradients
def test_zeros_have_no_gradient(gradients, kind):
    x, _, table = problem((1, 2, 3, 4), torch.float32, kind, False)
    x, dy = torch.zeros_like(x), torch.full_like(x, torch.inf)
    table[1] = 1
    for gradient in gradients(dy, None, x, None, table, kind, ALL):
        assert not gradient.any()


@pytest.mark.parametrize("needed", range(1, 8), ids="{:03b}".format)
@both_gradients
def test_only_what_is_wanted_is_made(gradients, needed):
    x, addend, table = problem((2, 2, 9, 4), torch.float32, "power", True)
    wanted = [bool(needed & 1), bool(needed & 2), bool(needed & 4)]
    inputs = (x, None, x, addend, table, "power")
    found, every = (gradients(*inputs, which) for which in (wanted, ALL))
    for want, g, other in zip(wanted, found, every, strict=True):
        assert torch.equal(g, other) if want else g.numel() == 0


@each_map
@both_gradients
def test_from_either_polarity_alone(gradients, kind, both):
    x, addend, table = problem((2, 2, 9, 4), torch.float32, kind, True)
    nothing = torch.zeros_like(x)
    inputs = (x, addend, table, kind, ALL)
    expected = gradients(nothing if both else x, x if both else nothing, *inputs)
    found = gradients(None if both else x, x if both else None, *inputs)
    for g, other in zip(found, expected, strict=True):
        torch.testing.assert_close(g, other)


def test_many_programs(monkeypatch):
    x, addend, table = problem((5, 2, 150, 3), torch.float64, "expm1", True)
    expected = in_pytorch(x, addend, table, "expm1", True)
    wanted = backward_library.in_pytorch(x, x, x, addend, table, "expm1", ALL)
    plans = (kernels.plan_signed_map, backward_kernels.plan_signed_map_backward)
    for programs in (1, 12, 10**6):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})
        monkeypatch.setattr(backward_kernels, "_PROGRAMS", programs)
        for plan in plans:
            plan.cache_clear()
        for shifted in (addend, torch.zeros_like(addend)):
            expected = in_pytorch(x, shifted, table, "expm1", True)
            found = in_kernel(x, shifted, table, "expm1", True)
            torch.testing.assert_close(found, expected)
            wanted = backward_library.in_pytorch(x, x, x, shifted, table, "expm1", ALL)
            found = backward_library.in_kernel(x, x, x, shifted, table, "expm1", ALL)
            torch.testing.assert_close(found, wanted)
    for plan in plans:
        plan.cache_clear()


@pytest.fixture(params=["dispatched", "straight"])
def straight(request, monkeypatch):
    """Calls through the dispatcher, or the kernels' own, which are interpreted on the CPU."""
    if request.param == "straight":
        monkeypatch.setattr(signed_map_library, "direct", lambda *_: True)


@each_map
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1)], ids=str)
def test_autograd(frozen, kind, both, straight):
    tensors = problem((2, 2, 9, 4), torch.float32, kind, both)
    results, wide = exact(*tensors, kind, both)
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = signed_map(*leaves, kind, both)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in leaves]
    # The last one alone: of the other nothing comes back.
    dy = upstream(tensors[0], 3)
    found[both].backward(dy)
    expected = torch.autograd.grad(results[-1], wide, dy.double())
    for i, (leaf, other) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (i in frozen)
        if i not in frozen:
            assert_near(leaf.grad, other)
    with torch.no_grad():
        assert not signed_map(*leaves, kind, both)[0].requires_grad


def test_second_derivatives_are_refused(straight):
    x, _, table = problem((1, 2, 3, 4), torch.float32, "power", False)
    x = x.detach().requires_grad_()
    y, _ = signed_map(x, None, table, "power")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="signed_map cannot be differentiated twice"):
        dx.sum().backward()


def test_it_compiles_as_one_operator():
    tensors = problem((2, 3, 4, 3), torch.float32, "power", True)
    leaves = [t.detach().requires_grad_() for t in tensors]
    compiled = torch.compile(signed_map, backend="aot_eager", fullgraph=True)
    found, expected = (f(*leaves, "power", True) for f in (compiled, signed_map))
    for y, z in zip(found, expected, strict=True):
        assert torch.equal(y, z)
    grads = [torch.autograd.grad(y[0].sum() + y[1].cos().sum(), leaves) for y in (found, expected)]
    for g, other in zip(*grads, strict=True):
        assert torch.equal(g, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 3, 3136, 32), (2048, 3, 49, 32), (4, 16, 49, 32)], ids=str)
@each_map
def test_the_sizes_of_polaformer(kind, both, shape, dtype):
    tensors = problem(shape, dtype, kind, both)
    results, leaves = exact(*tensors, kind, both)
    for y, z in zip(in_kernel(*tensors, kind, both), results, strict=False):
        assert_rounded(y, z)
    douts = [upstream(tensors[0], 3 + i) for i in range(2)][: 1 + both]
    inputs = (douts[0], douts[1] if both else None, *tensors, kind, ALL)
    found = backward_library.in_kernel(*inputs)
    wanted = torch.autograd.grad(results, leaves, [dy.double() for dy in douts])
    for g, again, other in zip(found, backward_library.in_kernel(*inputs), wanted, strict=True):
        assert_near(g, other)
        assert torch.equal(g, again)

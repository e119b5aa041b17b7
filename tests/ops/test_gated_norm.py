"""LayerNorm of a sum with a gate behind it in one kernel, against PyTorch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.gated_norm_library import (
    backward_in_kernel,
    backward_in_pytorch,
    gated_norm,
    in_kernel,
    in_pytorch,
)

KINDS = [*DTYPES, torch.float64]
SHAPES = [((2, 33, 64), 2), ((1, 3), 1), ((7, 30), 5), ((400, 40), 4), ((3, 1000), 8)]
SHAPES += [((2, 2, 3, 512), 1), ((3, 1030), 2), ((24,), 3)]


def draw(shape, heads, dtype=torch.float64, kept=None, strided=False):
    """x, v, gate, scale, weight and bias, the first three parts of wider rows or not."""
    torch.manual_seed(0)
    D = shape[-1]
    given = []
    for i in range(3):
        # Not around 0: the mean counts.
        wide = (i == 0) + torch.randn(*shape[:-1], D + 8 * (i + 1), dtype=torch.float64)
        part = (
            wide.to(DEVICE, dtype)[..., 8 : D + 8] if strided else wide[..., :D].to(DEVICE, dtype)
        )
        given.append(part if strided else part.contiguous())
    others = [torch.randn(n, dtype=torch.float64).to(DEVICE, kept or dtype) for n in (heads, D, D)]
    return [*given, *others]


def exact(x, v, gate, scale, weight, bias, eps=1e-5):
    a = x + v * scale.repeat_interleave(x.shape[-1] // len(scale))
    return F.layer_norm(a, x.shape[-1:], weight, bias, eps) * gate


def assert_near(actual, expected, rows=0):
    """rows: How many a sum is over."""
    eps = torch.finfo(actual.dtype).eps * (2 if actual.dtype.itemsize == 2 else 32)
    assert actual.shape == expected.shape
    bound = eps * (expected.abs().max() + 1 + rows**0.5)
    assert (actual.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("function", [in_kernel, in_pytorch, gated_norm])
def test_it_is_exact(function, strided, shape, heads, dtype):
    tensors = draw(shape, heads, dtype, strided=strided)
    y = function(*tensors, 1e-5)
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, exact(*(t.double() for t in tensors)))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("function", [backward_in_kernel, backward_in_pytorch])
def test_gradients_are_exact(function, strided, shape, heads, dtype):
    # 16-bit tensors have wider weights here, as under autocast.
    kept = torch.promote_types(dtype, torch.float32)
    tensors = draw(shape, heads, dtype, kept, strided)
    dy = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    actual = function(dy, *tensors, 1e-5)
    assert [t.dtype for t in actual] == 3 * [dtype] + 3 * [kept]
    assert all(t.is_contiguous() for t in actual)
    leaves = [t.double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(exact(*leaves), leaves, dy.double())
    for i, (got, wide) in enumerate(zip(actual, expected, strict=True)):
        assert_near(got, wide, 0 if i < 3 else dy.numel() // (heads if i == 3 else shape[-1]))


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("D", [8, 512, 1024])
def test_programs_go_over_several_tiles(D, programs, monkeypatch):
    from fbila.ops.kernels import gated_norm as kernels

    monkeypatch.setattr(kernels, "MULTIPROCESSORS", programs)
    monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})
    kernels.plan_gated_norm.cache_clear()
    shape = (3000 if D == 8 else 61, D)
    tensors = draw(shape, 2, torch.float32)
    dy = torch.randn(shape, device=DEVICE)
    y, gradients = in_kernel(*tensors, 1e-5), backward_in_kernel(dy, *tensors, 1e-5)
    again = backward_in_kernel(dy, *tensors, 1e-5)
    kernels.plan_gated_norm.cache_clear()
    assert all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))
    leaves = [t.double().requires_grad_() for t in tensors]
    expected = exact(*leaves)
    assert_near(y, expected.detach())
    for got, wide in zip(
        gradients, torch.autograd.grad(expected, leaves, dy.double()), strict=True
    ):
        assert_near(got, wide, shape[0] * (D if got.ndim == 1 else 1))


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, repeat=3)], ids=str)
def test_tensors_of_several_dtypes(dtypes):
    x, v, gate, *others = draw((9, 40), 2, torch.float32)
    x, v, gate = (t.to(kind) for t, kind in zip((x, v, gate), dtypes, strict=True))
    y = in_kernel(x, v, gate, *others, 1e-5)
    assert y.dtype == gate.dtype
    assert_near(y, exact(*(t.double() for t in (x, v, gate, *others))))
    leaves = [t.requires_grad_() for t in (x, v, gate, *others)]
    dy = torch.randn_like(y)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(exact(*wide), wide, dy.double())
    for got, want, leaf in zip(
        backward_in_kernel(dy, *(t.detach() for t in leaves), 1e-5), expected, leaves, strict=True
    ):
        assert got.dtype == leaf.dtype
        assert_near(got, want, 20)


def test_gradients_through_the_op():
    leaves = [t.requires_grad_() for t in draw((5, 6), 2)]
    torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, 1e-5), leaves)
    frozen = [t.detach() for t in leaves[3:]]
    torch.autograd.gradcheck(lambda *tensors: gated_norm(*tensors, *frozen, 1e-5), leaves[:3])
    (dx,) = torch.autograd.grad(gated_norm(*leaves, 1e-5).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="gated_norm cannot be differentiated twice"):
        dx.sum().backward()


def test_nothing_in_nothing_out():
    x, v, gate, *others = draw((5, 6), 2)
    tensors = [t[:0] for t in (x, v, gate)] + others
    assert in_kernel(*tensors, 1e-5).shape == (0, 6)
    assert not any(t.any() for t in backward_in_kernel(x[:0], *tensors, 1e-5))


def test_rows_that_are_not_there_have_no_gradient():
    """With an eps of 0 zeros would be divided by zero."""
    tensors = draw((3, 16), 2, torch.float32)
    for t in backward_in_kernel(tensors[0], *tensors, 0.0):
        assert t.isfinite().all()


def test_opcheck_and_errors():
    tensors = draw((2, 5, 16), 2, torch.float32)
    op, backward = torch.ops.fbila.gated_norm.default, torch.ops.fbila.gated_norm_backward.default
    torch.library.opcheck(op, (*tensors, 1e-5))
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in tensors), 1e-5))
    torch.library.opcheck(backward, (tensors[0], *tensors, 1e-5))
    x, v, gate, scale, weight, bias = tensors
    with pytest.raises(ValueError, match="v and gate must have the shape of x"):
        in_kernel(x, v[1:], gate, scale, weight, bias, 1e-5)
    with pytest.raises(ValueError, match="must divide 16"):
        in_kernel(x, v, gate, weight[:3], weight, bias, 1e-5)
    with pytest.raises(ValueError, match=r"must be \(16,\)"):
        in_kernel(x, v, gate, scale, weight[1:], bias, 1e-5)

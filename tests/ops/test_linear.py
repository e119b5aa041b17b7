"""A linear map, after GELU or not, whose gradients are partly kernels', against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops import linear as library
from fbila.ops.linear import _is_large, _Linear, by_pytorch, column_sums, gelu_backward, linear

KINDS = [*DTYPES, torch.float64]


def draw(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def near(actual, expected, factor=4):
    eps = (1 if actual.dtype.itemsize == 2 else 16) * torch.finfo(actual.dtype).eps
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= factor * eps * expected.norm()


def problem(dtype, shape=(3, 7, 24), out=40):
    x, weight = draw(*shape, dtype=dtype, seed=0), draw(out, shape[-1], dtype=dtype, seed=1)
    bias, dy = draw(out, dtype=dtype, seed=2), draw(*shape[:-1], out, dtype=dtype, seed=3)
    return [t.requires_grad_() for t in (x, weight, bias)], dy


def exact(leaves, dy, gelu):
    leaves = [t.detach().double().requires_grad_() for t in leaves]
    x, weight, bias = leaves
    y = F.linear(F.gelu(x) if gelu else x, weight, bias)
    return y.detach(), torch.autograd.grad(y, leaves, dy.double())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("by", ["kernels", "pytorch"])
def test_gradients(monkeypatch, by, gelu, dtype):
    if by == "pytorch":
        monkeypatch.setattr(library, "by_kernels", by_pytorch)
    leaves, dy = problem(dtype)
    y = _Linear.apply(*leaves, gelu)
    expected, wanted = exact(leaves, dy, gelu)
    near(y, expected)
    for found, exactly, leaf in zip(
        torch.autograd.grad(y, leaves, dy), wanted, leaves, strict=True
    ):
        assert found.dtype == leaf.dtype
        near(found, exactly)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_gradient_alone(which, gelu):
    leaves, dy = problem(torch.float32)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)
    (found,) = torch.autograd.grad(_Linear.apply(*leaves, gelu), leaves[which], dy)
    near(found, exact(leaves, dy, gelu)[1][which])


def test_hidden_layers_are_not_kept():
    leaves, _ = problem(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _Linear.apply(*leaves, True)
    assert [t.data_ptr() for t in kept] == [leaf.data_ptr() for leaf in leaves[:2]]


def test_gradients_of_gradients():
    leaves, _ = problem(torch.float64, (2, 3, 4), 5)
    for gelu in (False, True):
        assert torch.autograd.gradgradcheck(lambda *t, g=gelu: _Linear.apply(*t, g), leaves)


def test_views():
    leaves, dy = problem(torch.float32)
    x = torch.cat((leaves[0], leaves[0]), -1).detach()[..., 24:].requires_grad_()
    leaves = [x, *leaves[1:]]
    for given in (dy[..., :1].expand_as(dy), dy.transpose(0, 1).contiguous().transpose(0, 1)):
        for gelu in (False, True):
            found = torch.autograd.grad(_Linear.apply(*leaves, gelu), leaves, given)
            for f, w in zip(found, exact(leaves, given, gelu)[1], strict=True):
                near(f, w)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 40), (70, 264), (1, 24)], ids=str)
def test_column_sums(shape, dtype):
    x = draw(*shape, dtype=dtype, seed=0) + 1
    near(column_sums(x), x.double().sum(0), 1)


def test_column_sums_of_a_view():
    x = draw(9, 48, dtype=torch.float32, seed=0)
    for part in (x[:, 8:32], x[:, 3:10], x[::2], x.mT, x[:1].expand(4, -1)):
        near(column_sums(part), part.double().sum(0), 2)


def test_column_sums_over_many_programs(monkeypatch):
    from fbila.ops.kernels import column_sums as kernel

    monkeypatch.setattr(kernel, "ELEMENTS", 256)
    kernel.plan_column_sums.cache_clear()
    x = draw(777, 72, dtype=torch.float32, seed=0) + 1
    near(column_sums(x), x.double().sum(0), 1)
    kernel.plan_column_sums.cache_clear()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (70, 64)], ids=str)
def test_gelu_backward(shape, dtype):
    x, df = 3 * draw(*shape, dtype=dtype, seed=0), draw(*shape, dtype=dtype, seed=1)
    wide = x.double().requires_grad_()
    expected = F.gelu(wide)
    (wanted,) = torch.autograd.grad(expected, wide, df.double())
    dx, f = gelu_backward(x, df)
    near(f, expected.detach(), 1)
    near(dx, wanted, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_function(bias):
    (x, weight, b), _ = problem(torch.float32)
    b = b if bias else None
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))
    torch.testing.assert_close(linear(x, weight, b, True), F.linear(F.gelu(x), weight, b))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("gelu", [False, True])
def test_it_is_served_on_a_gpu_also_under_autocast(monkeypatch, gelu):
    assert "_Linear" not in type(linear(*problem(torch.float32)[0], gelu).grad_fn).__name__
    monkeypatch.setattr(library, "FEWEST", 1)
    leaves, dy = problem(torch.float32)
    assert "_Linear" in type(linear(*leaves, gelu).grad_fn).__name__
    with torch.autocast("cuda", torch.bfloat16):
        y = linear(leaves[0].bfloat16(), *leaves[1:], gelu)
        assert y.dtype == torch.bfloat16 and "_Linear" in type(y.grad_fn).__name__
        plain = F.linear(F.gelu(leaves[0].bfloat16()) if gelu else leaves[0], *leaves[1:])
    near(y, plain.double())
    found = torch.autograd.grad(y, leaves[1:], dy.bfloat16())
    for f, w in zip(found, torch.autograd.grad(plain, leaves[1:], dy.bfloat16()), strict=True):
        assert f.dtype == torch.float32
        assert (f - w).norm() <= 4 * torch.finfo(torch.bfloat16).eps * w.norm()


@pytest.mark.parametrize(
    "rows, inner, outer, served",
    [
        *((2**17, 64, 256, "any"), (2**15, 1024, 8, "any"), (2**15, 1023, 8, "none")),
        *((2**17, 8, 64, "with a bias"), (2**17, 8, 63, "none"), (2**17 - 1, 8, 64, "none")),
        *((2**20, 0, 64, "none"), (2**20, 64, 0, "none")),
    ],
)
def test_which_are_large(rows, inner, outer, served):
    x, weight = torch.empty(rows, inner, device="meta"), torch.empty(outer, inner, device="meta")
    found = [_is_large(x, weight, bias) for bias in (weight[:, :1].sum(1), None)]
    assert found == [served != "none", served == "any"]


@pytest.mark.parametrize("bias", [True, False])
def test_results_may_be_changed_in_place(bias):
    leaves, dy = problem(torch.float32)
    given = [*leaves[:2], leaves[2] if bias else None]
    y = _Linear.apply(*given, False)
    F.relu(y.permute(0, 2, 1), inplace=True)
    expected = F.relu(F.linear(*given))
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(t, leaves[:2], dy) for t in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_no_gradient_reads_may_be_changed(frozen):
    leaves, dy = problem(torch.float32)
    wanted = exact(leaves, dy, False)[1][1 - frozen]
    # The gradient by x reads the weight alone, and that by the weight x.
    given = [leaf.detach() if i == frozen else leaf * 1 for i, leaf in enumerate(leaves)]
    y = _Linear.apply(*given, False)
    given[1 - frozen].add_(1)
    near(torch.autograd.grad(y, leaves[1 - frozen], dy)[0], wanted)


@pytest.mark.parametrize("gelu", [False, True])
def test_backward_under_autocast_is_of_the_dtypes_of_the_forward_pass(gelu):
    leaves, dy = problem(torch.float32)
    y = _Linear.apply(*leaves, gelu)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = torch.autograd.grad(y, leaves, dy)
    for f, w in zip(found, exact(leaves, dy, gelu)[1], strict=True):
        near(f, w)


@pytest.mark.parametrize("gelu", [False, True])
def test_many_gradients_at_once(gelu):
    leaves, dy = problem(torch.float32)
    dy = torch.stack((dy, 2 * dy))
    y = _Linear.apply(*leaves, gelu)
    found = torch.autograd.grad(y, leaves, dy, is_grads_batched=True)
    for f, w in zip(found, exact(leaves, dy[0], gelu)[1], strict=True):
        near(f[0], w)
        near(f[1], 2 * w)

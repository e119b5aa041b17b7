"""GEGLU in one kernel, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.geglu_library import backward_in_kernel, backward_in_pytorch, geglu, in_kernel


def exact(x):
    a, g = x.double().chunk(2, -1)
    return a * F.gelu(g)


def draw(shape, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE)
    return (3 * x).to(dtype)


def assert_near(actual, expected):
    bound = (1 if actual.dtype.itemsize == 2 else 4) * torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 20), (3, 640), (1, 2), (5, 3, 2 * 130), (4, 6)], ids=str)
@pytest.mark.parametrize("function", [in_kernel, geglu])
def test_it_is_exact(function, shape, dtype):
    x = draw(shape, dtype)
    actual = function(x)
    assert actual.shape == (*shape[:-1], shape[-1] // 2)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_near(actual, exact(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 20), (3, 640), (1, 2), (5, 3, 2 * 130), (4, 6)], ids=str)
@pytest.mark.parametrize("function", [backward_in_kernel, backward_in_pytorch])
def test_its_gradient_is_exact(function, shape, dtype):
    x = draw(shape, dtype)
    dy = draw((*shape[:-1], shape[-1] // 2), dtype)
    leaf = x.double().requires_grad_()
    exact(leaf).backward(dy.double())
    actual = function(dy, x)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_near(actual, leaf.grad)


def test_gradients_through_the_op():
    x = draw((3, 10), torch.float64).requires_grad_()
    torch.autograd.gradcheck(geglu, x)
    (dx,) = torch.autograd.grad(geglu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="geglu cannot be differentiated twice"):
        dx.sum().backward()


def test_gradients_far_from_zero():
    gates = torch.tensor([-1e4, -30.0, -6.0, -1e-8, 0.0, 1e-8, 6.0, 1e4], device=DEVICE)
    x = torch.stack((torch.ones_like(gates), gates), 1)
    leaf = x.clone().requires_grad_()
    exact(leaf).sum().backward()
    actual = backward_in_kernel(torch.ones_like(gates)[:, None], x)
    torch.testing.assert_close(actual, leaf.grad, rtol=1e-6, atol=4e-7)


def test_far_from_zero():
    gates = torch.tensor([-1e4, -30.0, -6.0, -1e-8, 0.0, 1e-8, 6.0, 1e4], device=DEVICE)
    x = torch.cat((torch.ones_like(gates), gates))
    torch.testing.assert_close(in_kernel(x), F.gelu(gates), rtol=1e-6, atol=2e-7)


def test_strides():
    x = draw((6, 40), torch.float32)[::2]
    assert torch.equal(in_kernel(x), in_kernel(x.contiguous()))


def test_nothing_in_nothing_out():
    assert in_kernel(torch.zeros(0, 4, device=DEVICE)).shape == (0, 2)
    assert in_kernel(torch.zeros(3, 0, device=DEVICE)).shape == (3, 0)
    x = torch.zeros(0, 4, device=DEVICE)
    assert backward_in_kernel(x[:, :2], x).shape == x.shape


def test_an_odd_width():
    with pytest.raises(ValueError, match=r"two halves, got \[3, 5\]"):
        in_kernel(torch.zeros(3, 5, device=DEVICE))


def test_opcheck():
    x = draw((2, 3, 8), torch.float32)
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.fbila.geglu.default, (leaf,))
    torch.library.opcheck(torch.ops.fbila.geglu_backward.default, (x[..., :4], x))


def test_compiles_as_one_operator():
    x = draw((2, 3, 8), torch.float32)
    compiled = torch.compile(geglu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), geglu(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1280, 2560, 5120])
def test_the_widths_of_stable_diffusion(dtype, width):
    x = draw((2, 1000, 2 * width), dtype)
    assert_near(geglu(x), exact(x))

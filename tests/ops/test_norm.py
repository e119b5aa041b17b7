"""LayerNorm, alone or with LeakyReLU, in one kernel, against PyTorch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.kernels.norm import launch_norm
from fbila.ops.kernels.norm_backward import launch_grad_norm
from fbila.ops.norm_library import (
    layer_norm,
    layer_norm_leaky_relu,
    plain_backward_in_kernel,
    plain_backward_in_pytorch,
    plain_in_kernel,
    plain_in_pytorch,
)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 1, 1), (2, 5, 80), (3, 2, 1280)], ids=str)
@pytest.mark.parametrize("launch", [launch_norm, layer_norm_leaky_relu])
def test_of_part_of_a_wider_tensor(launch, shape, dtype):
    P, R, D = shape
    torch.manual_seed(0)
    wide = 3 + 2 * torch.randn(R, P * D + 7, dtype=torch.float64, device=DEVICE).to(dtype)
    x = wide[:, : P * D].unflatten(1, (P, D)).transpose(0, 1)
    weight, bias = torch.randn(2, P, D, dtype=torch.float64, device=DEVICE).to(dtype)
    actual = launch(x, weight, bias, 1e-5, 0.01)
    assert actual.is_contiguous() and actual.dtype == dtype
    for i in range(P):
        normed = F.layer_norm(x[i].double(), (D,), weight[i].double(), bias[i].double(), 1e-5)
        expected = F.leaky_relu(normed, 0.01)
        # Where the variance is small, cancellation in the mean counts.
        bound = 2 * torch.finfo(dtype).eps * (expected.abs().max() + 1)
        if dtype == torch.float32:
            bound *= 4
        if dtype == torch.float64:
            bound *= 8
        assert (actual[i].double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 1, 3), (2, 300, 80), (3, 2, 1280)], ids=str)
@pytest.mark.parametrize(
    "launch", [launch_grad_norm, torch.ops.fbila.layer_norm_leaky_relu_backward]
)
def test_gradients_of_part_of_a_wider_tensor(launch, shape, dtype):
    P, R, D = shape
    torch.manual_seed(0)
    # 16-bit tensors have wider weights here, as under autocast.
    kept = torch.promote_types(dtype, torch.float32)
    x, dy = (
        (3 + 2 * torch.randn(R, P * D + 7, dtype=torch.float64, device=DEVICE))
        .to(dtype)[:, : P * D]
        .unflatten(1, (P, D))
        .transpose(0, 1)
        for _ in range(2)
    )
    weight, bias = torch.randn(2, P, D, dtype=torch.float64, device=DEVICE).to(kept)
    dx, *rest = launch(dy, x, weight, bias, 1e-5, 0.01)
    actual = [dx, *(rest[0] if len(rest) == 1 else rest)]
    assert [t.dtype for t in actual] == [dtype, kept, kept]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    for i in range(P):
        normed = F.layer_norm(exact[0][i], (D,), exact[1][i], exact[2][i], 1e-5)
        F.leaky_relu(normed, 0.01).backward(dy[i].double())
    for wide, got in zip(exact, actual, strict=True):
        eps = torch.finfo(got.dtype).eps
        bound = 8 * eps * (wide.grad.abs().max() + 1 + R**0.5)
        assert (got.double() - wide.grad).abs().max() <= bound


def test_gradients_through_the_op():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(2, 2, 6, dtype=torch.float64, device=DEVICE).unbind()
    weight.requires_grad_(), bias.requires_grad_()
    torch.autograd.gradcheck(
        lambda *tensors: layer_norm_leaky_relu(*tensors, 1e-5, 0.01), (x, weight, bias)
    )
    (dx,) = torch.autograd.grad(
        layer_norm_leaky_relu(x, weight, bias, 1e-5, 0.01).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        dx.sum().backward()


def test_nothing_in_nothing_out():
    x = torch.randn(2, 0, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 16, device=DEVICE, requires_grad=True)
    y = layer_norm_leaky_relu(x, weight, weight, 1e-5, 0.01)
    assert y.shape == (2, 0, 16)
    y.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


def test_opcheck():
    x = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 16, device=DEVICE)
    op = torch.ops.fbila.layer_norm_leaky_relu.default
    torch.library.opcheck(op, (x, weight, weight, 1e-5, 0.01))
    backward = torch.ops.fbila.layer_norm_leaky_relu_backward.default
    torch.library.opcheck(backward, (x.detach(), x.detach(), weight, weight, 1e-5, 0.01))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 3), (7, 30), (3, 2, 2, 320)], ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", ""])
@pytest.mark.parametrize("function", [plain_in_kernel, layer_norm])
def test_without_an_activation(function, shape, affine, dtype):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64, device=DEVICE)).to(dtype)
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64, device=DEVICE).to(dtype)
    weight, bias = (t if name in affine else None for name, t in (("w", weight), ("b", bias)))
    actual = function(x, weight, bias, 1e-5)
    assert actual.is_contiguous() and actual.dtype == dtype
    wide = (None if t is None else t.double() for t in (weight, bias))
    expected = F.layer_norm(x.double(), shape[-1:], *wide, 1e-5)
    bound = 2 * torch.finfo(dtype).eps * (expected.abs().max() + 1)
    assert (actual.double() - expected).abs().max() <= bound * (1 if dtype.itemsize == 2 else 8)


def test_without_an_activation_strides_and_nothing():
    x = torch.randn(6, 5, 16, device=DEVICE)[::2]
    assert torch.equal(
        plain_in_kernel(x, None, None, 1e-5), plain_in_kernel(x.contiguous(), None, None, 1e-5)
    )
    assert plain_in_kernel(x[:0], None, None, 1e-5).shape == (0, 5, 16)


def test_without_an_activation_opcheck_and_errors():
    x, weight = torch.randn(2, 5, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    op = torch.ops.fbila.layer_norm.default
    torch.library.opcheck(op, (x, weight, weight, 1e-5))
    torch.library.opcheck(op, (x, None, None, 1e-5))
    torch.library.opcheck(op, (x, weight, None, 1e-5, torch.float16))
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, None, 1e-5))
    backward = torch.ops.fbila.layer_norm_backward.default
    torch.library.opcheck(backward, (x.half(), x, weight, 1e-5))
    with pytest.raises(ValueError, match=r"shape \[16\] .* got \[15\]"):
        plain_in_kernel(x, weight[1:], None, 1e-5)


@pytest.mark.parametrize(
    "dtypes", [*itertools.product([*DTYPES, torch.float64], repeat=2)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 3), (7, 30), (700, 40)], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("function", [plain_backward_in_kernel, plain_backward_in_pytorch])
def test_the_gradient_without_an_activation(function, shape, affine, dtypes):
    dtype, dtype_y = dtypes
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64, device=DEVICE)).to(dtype)
    dy = torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype_y)
    weight = torch.randn(shape[-1], dtype=torch.float64, device=DEVICE) if affine else None
    leaf = x.double().requires_grad_()
    F.layer_norm(leaf, shape[-1:], weight, None, 1e-5).backward(dy.double())
    actual = function(dy, x, weight, 1e-5)
    assert actual.dtype == dtype and actual.is_contiguous()
    bound = (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps
    assert (actual.double() - leaf.grad).abs().max() <= bound * (leaf.grad.abs().max() + 1)


def test_the_gradient_of_the_input_alone():
    x = torch.randn(5, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, device=DEVICE)
    torch.autograd.gradcheck(lambda x: layer_norm(x, weight, weight, 1e-5), x)
    with pytest.raises(NotImplementedError, match="no gradients of its weights and biases"):
        layer_norm(x, weight.requires_grad_(), weight, 1e-5)
    with torch.no_grad():
        layer_norm(x, weight, weight, 1e-5)
    weight.requires_grad_(False)
    (dx,) = torch.autograd.grad(layer_norm(x, weight, None, 1e-5).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm cannot be differentiated twice"):
        dx.sum().backward()


def test_a_launch_is_for_one_dtype_of_each_tensor():
    from fbila.ops.kernels.norm import plan_norm

    call = (2, 5, 16), (80, 16, 1), torch.bfloat16
    dtypes = list(itertools.product((torch.bfloat16, torch.float32), repeat=3))
    assert len({plan_norm(*call, others, 1e-5, 0.01) for others in dtypes}) == len(dtypes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("function", [plain_in_kernel, plain_in_pytorch])
def test_into_another_dtype(function, dtype):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(7, 40, dtype=torch.float64, device=DEVICE)).to(dtype)
    weight, bias = torch.randn(2, 40, device=DEVICE)
    other = torch.float32 if dtype == torch.float16 else torch.float16
    actual = function(x, weight, bias.half(), 1e-5, other)
    assert actual.dtype == other
    expected = F.layer_norm(x.double(), (40,), weight.double(), bias.half().double(), 1e-5)
    bound = (1 if other.itemsize == 2 else 16) * torch.finfo(other).eps
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)

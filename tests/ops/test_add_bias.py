"""The end of a residual block in one kernel, against PyTorch in float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES

from fbila.ops.add_bias_library import add_bias, in_kernel, in_pytorch
from fbila.ops.memory_format import empty_in_order, is_channels_last


def draw(shape, dtype, last=False, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype)
    return empty_in_order(x, last).copy_(x)


def exact(x, residual, *biases):
    y = x.double() + residual.double()
    for bias in biases:
        if bias is not None:
            y = y + bias.double().view(-1, *[1] * (x.ndim - 2))
    return y


def assert_rounded_once(actual, expected):
    # Sums of float64 and float32 round in between.
    bound = (0.5 if actual.dtype.itemsize == 2 else 2) * torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= 1.01 * bound * expected.abs().max()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 8, 8), (3, 30, 5, 7), (1, 20, 1, 1), (2, 96, 17)])
@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_both_orders(shape, dtype, last_x, last):
    x, residual = draw(shape, dtype, last_x), draw(shape, dtype, last, seed=1)
    biases = draw((2, shape[1]), dtype, seed=2)
    actual = in_kernel(x, residual, *biases)
    assert actual.dtype == dtype
    assert is_channels_last(actual) == is_channels_last(residual)
    assert_rounded_once(actual, exact(x, residual, *biases))


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_biases_may_be_missing(present, function):
    x, residual = (draw((2, 6, 4, 5), torch.float32, seed=i) for i in range(2))
    biases = [draw((6,), torch.float32, seed=2 + i) if there else None
              for i, there in enumerate(present)]  # fmt: skip
    assert_rounded_once(function(x, residual, *biases), exact(x, residual, *biases))


def test_what_is_dense_in_neither_order_is_copied():
    x, residual = (draw((2, 6, 4, 10), torch.float32, seed=i)[..., ::2] for i in range(2))
    assert torch.equal(in_kernel(x, residual, None, None), x + residual)


def test_nothing_in_nothing_out():
    x = torch.zeros(0, 6, 4, 5, device=DEVICE)
    assert in_kernel(x, x, None, None).shape == x.shape


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_the_wider_dtype(function, dtypes, last_x, last):
    shape = (2, 36, 5, 7)
    x, residual = draw(shape, dtypes[0], last_x), draw(shape, dtypes[1], last, seed=1)
    biases = draw((36,), torch.float32, seed=2), draw((36,), torch.float16, seed=3)
    actual = function(x, residual, *biases)
    assert actual.dtype == (x + residual).dtype == torch.float32
    assert is_channels_last(actual) == is_channels_last(residual)
    assert_rounded_once(actual, exact(x, residual, *biases))


@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_gradients_lie_as_the_inputs_do(dtypes, last_x, last):
    shape = (2, 6, 4, 5)
    x = draw(shape, dtypes[0], last_x).requires_grad_()
    residual = draw(shape, dtypes[1], last, seed=1).requires_grad_()
    bias, dy = draw((6,), torch.float32), draw(shape, torch.float32, not last, seed=2)
    for leaf, grad in zip(
        (x, residual), torch.autograd.grad(add_bias(x, residual, bias), (x, residual), dy),
        strict=True,
    ):  # fmt: skip
        assert is_channels_last(grad) == is_channels_last(leaf)
        assert torch.equal(grad, dy.to(leaf.dtype))


def test_biases_have_no_gradients():
    x, bias = draw((2, 6, 4, 5), torch.float32), draw((6,), torch.float32).requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients of its weights and biases"):
        add_bias(x, x, bias)
    with torch.no_grad():
        add_bias(x, x, bias)


def test_gradients_of_gradients():
    x, residual = (draw((2, 3, 2), torch.float64, seed=i).requires_grad_() for i in range(2))
    torch.autograd.gradgradcheck(lambda *tensors: add_bias(*tensors), (x, residual))


def test_tensors_that_are_not_alike():
    x = torch.zeros(2, 6, 4, 5, device=DEVICE)
    with pytest.raises(ValueError, match="must be alike"):
        in_kernel(x, x[..., 1:], None, None)


@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last_x, last):
    shape = (2, 6, 4, 5)
    x, residual = draw(shape, torch.float32, last_x), draw(shape, torch.float32, last, seed=1)
    bias = draw((6,), torch.float32)
    for other in (x, x.half()):
        torch.library.opcheck(torch.ops.fbila.add_bias.default, (other, residual, bias, None))


def test_compiles_as_one_operator():
    x, residual = (draw((2, 6, 4, 5), torch.float32, seed=i) for i in range(2))
    compiled = torch.compile(add_bias, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, residual), add_bias(x, residual))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last_x", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_the_sizes_of_stable_diffusion(dtype, last_x, last):
    shape = (2, 320, 129, 64)
    x, residual = draw(shape, dtype, last_x), draw(shape, dtype, last, seed=1)
    biases = draw((2, 320), dtype, seed=2)
    assert_rounded_once(add_bias(x, residual, *biases), exact(x, residual, *biases))

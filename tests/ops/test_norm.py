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
    actual = launch(dy, x, weight, bias, 1e-5, 0.01)
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
    leaf = weight.clone().requires_grad_()
    torch.library.opcheck(op, (x.half().requires_grad_(), leaf, leaf, 1e-5, torch.float32))
    backward = torch.ops.fbila.layer_norm_backward.default
    for needed in ([True] * 3, [True, False, False], [False, True, False]):
        torch.library.opcheck(backward, (x.half(), x, weight, weight, 1e-5, needed))
    torch.library.opcheck(backward, (x.half(), x, None, None, 1e-5, [True] * 3))
    with pytest.raises(ValueError, match=r"shape \[16\] .* got \[15\]"):
        plain_in_kernel(x, weight[1:], None, 1e-5)


each_gradient = pytest.mark.parametrize(
    "function", [plain_backward_in_kernel, plain_backward_in_pytorch]
)


def exact_gradients(dy, x, weight, bias):
    """Of the leaves that there are, in float64."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], 1e-5)
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, there, dy.double()))
    return [None if t is None else next(found) for t in leaves]


def assert_gradients(actual, expected, rows):
    for got, wide in zip(actual, expected, strict=True):
        if wide is None:
            assert got.numel() == 0
            continue
        # Sums over rows are of as many numbers.
        of_rows = wide.ndim == 1
        eps = torch.finfo(got.dtype).eps * (2 if got.dtype.itemsize == 2 else 16)
        bound = eps * (wide.abs().max() + 1 + (rows**0.5 if of_rows else 0))
        assert (got.double() - wide).abs().max() <= bound


@pytest.mark.parametrize(
    "dtypes", [*itertools.product([*DTYPES, torch.float64], repeat=2)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 3), (7, 30), (700, 40), (24,)], ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", ""])
@each_gradient
def test_the_gradients_without_an_activation(function, shape, affine, dtypes):
    dtype, dtype_y = dtypes
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64, device=DEVICE)).to(dtype)
    dy = torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype_y)
    # 16-bit tensors have wider weights here, as under autocast.
    kept = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64, device=DEVICE).to(kept)
    weight, bias = (t if name in affine else None for name, t in (("w", weight), ("b", bias)))
    actual = function(dy, x, weight, bias, 1e-5, [True] * 3)
    assert actual[0].dtype == dtype and actual[0].is_contiguous()
    assert all(t.dtype == kept for t in actual[1:] if t.numel())
    assert_gradients(actual, exact_gradients(dy, x, weight, bias), x[..., 0].numel())


@pytest.mark.parametrize("D", [1, 8, 320, 512, 513, 768, 1024, 1025, 2048])
@pytest.mark.parametrize("programs", [None, 1, 2])
def test_gradients_by_programs_that_go_over_several_tiles(D, programs, monkeypatch):
    from fbila.ops.kernels import norm_backward

    if programs:
        monkeypatch.setattr(norm_backward, "MULTIPROCESSORS", programs)
    norm_backward.plan_grad_norm.cache_clear()
    norm_backward.plan_grad_layer_norm.cache_clear()
    torch.manual_seed(0)
    rows = 3000 if D == 1 else 47
    x, dy = 1 + 2 * torch.randn(2, rows, D, device=DEVICE)
    weight, bias = torch.randn(2, D, device=DEVICE)
    actual = plain_backward_in_kernel(dy, x, weight, bias, 1e-5, [True] * 3)
    norm_backward.plan_grad_norm.cache_clear()
    norm_backward.plan_grad_layer_norm.cache_clear()
    assert_gradients(actual, exact_gradients(dy, x, weight, bias), rows)


@each_gradient
def test_only_the_gradients_that_are_wanted(function):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 3, 9, 40, device=DEVICE)
    weight, bias = torch.randn(2, 40, device=DEVICE)
    expected = exact_gradients(dy, x, weight, bias)
    for mask in itertools.product([False, True], repeat=3):
        actual = function(dy, x, weight, bias, 1e-5, list(mask))
        wanted = [t if needed else None for t, needed in zip(expected, mask, strict=True)]
        assert_gradients(actual, wanted, 27)


def test_gradients_of_strided_rows_and_of_nothing():
    torch.manual_seed(0)
    wide, dy = torch.randn(6, 5, 24, device=DEVICE), torch.randn(3, 1, 1, device=DEVICE)
    x, dy = wide[::2, :, 3:19], dy.expand(3, 5, 16)
    weight, bias = torch.randn(2, 32, device=DEVICE)[:, ::2]
    arguments = weight, bias, 1e-5, [True] * 3
    actual = plain_backward_in_kernel(dy, x, *arguments)
    for got, same in zip(
        actual, plain_backward_in_kernel(dy.contiguous(), x.contiguous(), *arguments), strict=True
    ):
        assert torch.equal(got, same)
    assert_gradients(actual, exact_gradients(dy, x, weight, bias), 15)
    nothing = plain_backward_in_kernel(dy[:0], x[:0], *arguments)
    assert nothing[0].shape == (0, 5, 16)
    assert all(t.shape == (16,) and not t.any() for t in nothing[1:])


def test_rows_that_are_not_there_have_no_gradient():
    """With an eps of 0 zeros would be divided by zero."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 3, 16, device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    for t in plain_backward_in_kernel(dy, x, weight, weight, 0.0, [True] * 3):
        assert t.isfinite().all()


def test_sums_are_of_few_bytes():
    from fbila.ops.kernels.norm_backward import plan_grad_layer_norm

    kind = torch.bfloat16
    kinds = (kind, torch.float32, None, kind, torch.float32, torch.float32)
    for rows, D, programs in (
        (200704, 64, 528),
        (200704, 128, 528),
        (200704, 96, 396),
        (200704, 768, 264),
        (50176, 256, 528),
        (3136, 512, 196),
        (3136, 2048, 528),
        (700, 512, 132),
        (7, 512, 2),
    ):
        launch, _ = plan_grad_layer_norm((rows, D), kind, kinds, 1e-5)
        assert launch.grid == (programs, 1, 1)
        # Against x, dy and dx.
        assert rows < 1000 or 8 * programs <= 6 * rows / 4
    frozen, _ = plan_grad_layer_norm((700, 512), kind, (*kinds[:4], None, None), 1e-5)
    assert frozen.grid == (175, 1, 1)


def test_gradients_of_all_through_the_op():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(2, 6, dtype=torch.float64, device=DEVICE).unbind()
    norm = lambda *tensors: layer_norm(*tensors, 1e-5)  # noqa: E731
    torch.autograd.gradcheck(lambda x: norm(x, weight, bias), x)
    weight.requires_grad_(), bias.requires_grad_()
    torch.autograd.gradcheck(norm, (x, weight, bias))
    torch.autograd.gradcheck(lambda x, weight: norm(x, weight, None), (x, weight))
    torch.autograd.gradcheck(lambda weight, bias: norm(x.detach(), weight, bias), (weight, bias))
    for leaf in (x, weight):
        (d,) = torch.autograd.grad(norm(x, weight, None).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="layer_norm cannot be differentiated twice"):
            d.sum().backward()


def test_gradients_are_the_same_every_time():
    torch.manual_seed(0)
    x, dy = torch.randn(2, 700, 40, device=DEVICE)
    weight, bias = torch.randn(2, 40, device=DEVICE)
    arguments = dy, x, weight, bias, 1e-5, [True] * 3
    first, again = (plain_backward_in_kernel(*arguments) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


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

"""A depthwise and a grouped pointwise convolution in one kernel, against PyTorch in float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES

from fbila.ops.kernels.separable_conv import plan_separable_conv
from fbila.ops.memory_format import is_channels_last
from fbila.ops.separable_conv_library import (
    convolutions,
    in_kernel,
    in_pytorch,
    separable_conv2d,
    separable_conv2d_into,
)

from .separable_cases import assert_near, draw, each_format, exact

each_function = pytest.mark.parametrize("function", [in_kernel, in_pytorch])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "D", "k"),
    [
        ((2, 64, 9, 40), 32, 5),
        ((1, 96, 18, 8), 32, 3),
        ((1, 48, 12, 17), 16, 7),
        ((2, 24, 5, 33), 8, 5),
        ((1, 48, 7, 5), 24, 5),
        ((1, 20, 6, 6), 10, 3),
        ((1, 64, 10, 6), 64, 5),
        ((1, 9, 4, 34), 1, 1),
    ],
    ids=str,
)
@each_format
def test_it_is_exact(shape, D, k, dtype, order):
    tensors = draw(shape, D, k, dtype, order=order)
    actual = in_kernel(*tensors)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=order)
    assert_near(actual, exact(*tensors))


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
@each_format
@each_function
def test_biases_may_be_missing(function, biases, order):
    tensors = draw((2, 32, 6, 5), 16, 3, torch.float32, biases=biases, order=order)
    assert_near(function(*tensors), exact(*tensors))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 70)], ids=str)
@pytest.mark.parametrize("k", [3, 7])
@each_format
def test_pictures_smaller_than_the_kernel_and_the_tile(size, k, order):
    tensors = draw((2, 16, *size), 8, k, torch.float32, order=order)
    actual = in_kernel(*tensors)
    assert is_channels_last(actual) == is_channels_last(tensors[0])
    assert_near(actual, exact(*tensors))


@each_format
def test_nothing_of_a_neighbouring_row_sample_or_group_is_read(order):
    """What lies beyond a border in memory is another row, sample or group: NaN there shows."""
    x, *weights = draw((3, 32, 6, 35), 16, 5, torch.float32, order=order)
    x[0] = x[2] = torch.nan
    x[1, :16] = torch.nan
    expected = exact(x[1:2, 16:], *(w if w is None else w[16:] for w in weights))
    assert_near(in_kernel(x, *weights)[1:2, 16:], expected)


@pytest.mark.parametrize(
    ("view", "last"),
    [
        (lambda x: x[:, 16:48], False),
        (lambda x: x[:, :32, 1:7, 3:12], False),
        (lambda x: x.contiguous(memory_format=torch.channels_last)[:, 8:40], True),
        (lambda x: x.contiguous(memory_format=torch.channels_last)[:, :32, 1:, ::2], True),
        (lambda x: x[:, :32, :, ::2], False),
        (lambda x: x[:1, :32].expand(2, -1, -1, -1), False),
        (lambda x: x[:, :32].transpose(2, 3), False),
    ],
    ids=["channels", "window", "channels last", "window last", "columns", "expanded", "transposed"],
)
@each_function
def test_strides(function, view, last):
    x, *weights = draw((2, 64, 9, 16), 16, 3, torch.float32)
    weights = [w[:32] for w in weights]
    x = view(x)
    actual = function(x, *weights)
    order = torch.channels_last if last else torch.contiguous_format
    assert actual.is_contiguous(memory_format=order)
    assert_near(actual, exact(x, *weights))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 6, 34), (2, 24, 5, 7), (1, 32, 4, 6), (2, 16, 1, 1)])
@each_format
def test_into_a_part_of_a_larger_tensor(shape, dtype, order):
    """Whatever lies between the samples of y, and before and behind them, stays."""
    B, C, H, W = shape
    x, *weights = draw(shape, 8, 3, dtype, order=order)
    # An odd number of elements from sample to sample, from 8 bytes on in memory.
    size, first = C * H * W, 8 // dtype.itemsize
    step = size + 7 + size % 2
    memory = torch.full((first + B * step,), 7.0, dtype=dtype, device=DEVICE)
    strides = (step, 1, W * C, C) if order is torch.channels_last else (step, H * W, W, 1)
    y = memory.as_strided(shape, strides, first)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    untouched.as_strided(shape, strides, first).fill_(False)
    separable_conv2d_into(y, x, *weights)
    assert_near(y, exact(x, *weights))
    assert (memory[untouched] == 7).all()


@each_format
def test_one_part_of_a_picture_is_made_of_another(order):
    """In channels_last the pixels of a part are not dense, which y must be."""
    whole = torch.zeros(3, 48, 5, 6, device=DEVICE).contiguous(memory_format=order)
    parts = whole.chunk(3, 1)
    x, *weights = draw((3, 16, 5, 6), 8, 3, torch.float32)
    parts[0].copy_(x)
    if order is torch.channels_last:
        with pytest.raises(ValueError, match="channels_last samples"):
            separable_conv2d_into(parts[1], parts[0], *weights)
    else:
        separable_conv2d_into(parts[1], parts[0], *weights)
        assert_near(parts[1], exact(x, *weights))
        assert torch.equal(parts[0], x) and not parts[2].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 16, 4, 6, device=DEVICE),
        lambda: torch.zeros(3, 16, 4, 5, device=DEVICE),
        lambda: torch.zeros(2, 16, 4, 5, device=DEVICE, dtype=torch.float16),
        lambda: torch.zeros(2, 4, 5, 16, device=DEVICE).permute(0, 3, 1, 2),
        # Dense if it were moved from one device to another.
        lambda: torch.zeros(2, 16, 4, 10, device=DEVICE)[..., ::2],
    ],
    ids=["width", "batch", "dtype", "order", "columns"],
)
def test_results_of_another_form(make):
    tensors = draw((2, 16, 4, 5), 8, 3, torch.float32)
    separable_conv2d_into(torch.empty_like(tensors[0]), *tensors)
    with pytest.raises(ValueError, match="y must be as x"):
        separable_conv2d_into(make(), *tensors)


def test_alignment_is_told_of_dense_results():
    """By a unit of all the elements that an access may have, and of those that samples allow."""

    def unit(shape, last, step):
        stride = torch.zeros(shape).stride()
        plan = plan_separable_conv(shape, stride, torch.float16, last, 16, 3, step)
        return plan.constants["UNIT_Y"]

    shape, size = (2, 32, 4, 6), 32 * 4 * 6
    assert [unit(shape, last, size) for last in (False, True)] == [2, 8]
    assert [unit(shape, last, size + 2) for last in (False, True)] == [2, 2]
    assert [unit(shape, last, size + 1) for last in (False, True)] == [1, 1]
    # Of a single sample there is no next one.
    assert [unit((1, *shape[1:]), last, 1) for last in (False, True)] == [2, 8]
    assert unit((2, 32, 4, 5), False, size) == 1


@pytest.mark.parametrize(
    ("axis", "stride"), [(0, 3 * 2**28), (1, 9 * 2**24), (2, 2**28), (3, 2**28)], ids=str
)
def test_offsets_beyond_2_31(axis, stride):
    """On a CPU the storage is never touched but for the few elements in use."""
    shape, strides = (4, 16, 10, 10), [1600, 100, 10, 1]
    if axis == 3:
        strides = [1600, 1, 160, 16]
    x, *weights = draw(shape, 16, 3, torch.float16)
    if axis == 0:
        strides[0] = stride
    strides[axis] = stride
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    far = torch.empty(length, dtype=x.dtype, device=DEVICE).as_strided(shape, strides).copy_(x)
    assert torch.equal(in_kernel(far, *weights), in_kernel(x, *weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 16, 24, 64])
@pytest.mark.parametrize("last", [False, True])
def test_tiles_are_as_large_as_products_must_be(dtype, D, last):
    """16 rows and columns; the interpreter takes fewer."""
    for size in ((1, 1), (1, 3), (5, 1), (2, 2), (40, 40)):
        shape = (1, D, *size)
        stride = torch.zeros(shape).stride()
        plan = plan_separable_conv(shape, stride, dtype, last, D, 5, stride[0])
        assert plan.constants["LANES"] * plan.constants["PIXELS"] >= 16
        assert plan.constants["BLOCK_D"] >= max(D, 16)


@each_function
@each_format
def test_nothing_in_nothing_out(function, order):
    tensors = draw((0, 16, 4, 5), 8, 3, torch.float32, order=order)
    assert function(*tensors).shape == (0, 16, 4, 5)


@pytest.mark.parametrize(
    ("place", "weight", "message"),
    [
        (1, torch.zeros(16, 1, 4, 4), "odd k"),
        (1, torch.zeros(16, 2, 3, 3), r"must be \(16, 1, k, k\)"),
        (1, torch.zeros(16, 1, 3, 5), r"must be \(16, 1, k, k\)"),
        (3, torch.zeros(16, 5, 1, 1), "divides 16"),
        (3, torch.zeros(16, 8, 3, 3), "divides 16"),
        (3, torch.zeros(16, 8, 1, 1).double(), "got torch.float64"),
        (2, torch.zeros(15), "16 elements, got 15"),
    ],
)
def test_weights_of_another_form(place, weight, message):
    tensors = list(draw((1, 16, 4, 5), 8, 3, torch.float32))
    tensors[place] = weight.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        in_kernel(*tensors)


def test_groups_that_are_too_wide():
    with pytest.raises(ValueError, match="at most 64"):
        in_kernel(*draw((1, 128, 2, 2), 128, 3, torch.float32))


def test_gradients_are_pytorchs():
    x, *rest = draw((2, 6, 4, 3), 3, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (x, *rest)]
    torch.autograd.gradcheck(separable_conv2d, leaves)
    expected = torch.autograd.grad(convolutions(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(separable_conv2d(*leaves).square().sum(), leaves)
    assert all(map(torch.equal, actual, expected))


def test_forward_derivatives_are_pytorchs():
    x, *rest = draw((2, 6, 4, 3), 3, 3, torch.float64)
    _, actual = torch.func.jvp(lambda x: separable_conv2d(x, *rest), (x,), (x,))
    _, expected = torch.func.jvp(lambda x: convolutions(x, *rest), (x,), (x,))
    assert expected.any() and torch.equal(actual, expected)


@each_format
def test_opcheck(order):
    for shape in ((2, 16, 4, 5), (2, 16, 1, 1)):
        tensors = draw(shape, 8, 3, torch.float32, order=order, biases=(True, False))
        torch.library.opcheck(torch.ops.fbila.separable_conv2d.default, tensors)
    leaf = tensors[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fbila.separable_conv2d.default, (leaf, *tensors[1:]))


def test_compiles_as_one_operator():
    tensors = draw((2, 16, 4, 5), 8, 3, torch.float32)
    compiled = torch.compile(separable_conv2d, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), separable_conv2d(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 1152, 32, 32), (1, 1536, 128, 128)], ids=str)
@each_format
def test_the_sizes_of_efficientvit_and_dc_ae(shape, dtype, order):
    tensors = draw(shape, 32, 5, dtype, biases=(False, False), order=order)
    assert_near(separable_conv2d(*tensors), exact(*tensors))

"""The gradient of GroupNorm with what is added before it and SiLU behind it, against float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES

from fbila.ops import group_norm_backward_library as library
from fbila.ops import group_norm_library, group_sizes
from fbila.ops.group_norm_library import forward_in_kernel, forward_in_pytorch, group_norm
from fbila.ops.kernels import group_norm as split_kernels
from fbila.ops.memory_format import is_channels_last

from .test_group_norm import EPS, SHAPES, exact, in_order, make


@pytest.fixture(params=["one launch", "three launches"])
def way(request, monkeypatch):
    """As in test_group_norm."""
    if request.param == "three launches":
        monkeypatch.setattr(group_sizes, "LONGEST", 0)
        for name, value in (("STATISTICS", 128), ("APPLY", 128), ("PROGRAMS", 3), ("PARTS", 16)):
            monkeypatch.setattr(split_kernels, name, value)
    for planned in (group_norm_library.planned, library.planned):
        planned.cache_clear()
    yield request.param
    for planned in (group_norm_library.planned, library.planned):
        planned.cache_clear()


def draw_gradient(x, dtype, last):
    generator = torch.Generator(DEVICE).manual_seed(1)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=DEVICE)
    return in_order(dy.to(dtype), last)


def exact_gradient(dy, x, *arguments):
    leaf = x.double().requires_grad_()
    (dx,) = torch.autograd.grad(exact(leaf, *arguments), leaf, dy.double())
    return dx


def assert_near(actual, expected):
    bound = (2 if actual.dtype.itemsize == 2 else 24) * torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


def gradient(dy, x, vectors, groups, silu, pytorch=False):
    forward = forward_in_pytorch if pytorch else forward_in_kernel
    _, statistics = forward(x, *vectors, groups, EPS, silu, False)
    backward = library.in_pytorch if pytorch else library.in_kernel
    return backward(dy, x, *vectors, statistics, silu)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_it_is_exact_in_the_order_of_x(way, shape, groups, dtype, last):
    x, *vectors = make(shape, dtype, last=last)
    dy = draw_gradient(x, dtype, last)
    actual = gradient(dy, x, vectors, groups, True)
    assert actual.dtype == dtype
    assert is_channels_last(actual) == is_channels_last(x)
    assert_near(actual, exact_gradient(dy, x, *vectors, groups, True))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("last_y", [False, True])
@pytest.mark.parametrize("pytorch", [False, True], ids=["kernel", "pytorch"])
def test_dy_in_either_order(way, pytorch, added, silu, last, last_y):
    x, *vectors = make((2, 40, 9, 5), torch.float32, last=last, added=added)
    dy = draw_gradient(x, torch.float32, last_y)
    actual = gradient(dy, x, vectors, 4, silu, pytorch)
    assert is_channels_last(actual) == last
    assert_near(actual, exact_gradient(dy, x, *vectors, 4, silu))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("pytorch", [False, True], ids=["kernel", "pytorch"])
def test_dtypes_that_differ(way, pytorch, dtypes):
    x, *vectors = make((2, 40, 9, 5), dtypes[0])
    vectors = [v.to(d) for v, d in zip(vectors, (*dtypes, *dtypes), strict=True)]
    dy = draw_gradient(x, dtypes[1], False)
    actual = gradient(dy, x, vectors, 4, True, pytorch)
    assert actual.dtype == dtypes[0]
    assert_near(actual, exact_gradient(dy, x, *vectors, 4, True))


def test_large_means_and_shifts_do_not_cancel(way):
    x, shift, *vectors = make((2, 24, 9, 7), torch.float32, mean=300.0)
    shift += 300.0
    dy = draw_gradient(x, torch.float32, False)
    actual = gradient(dy, x, (shift, *vectors), 3, True)
    expected = exact_gradient(dy, x, shift, *vectors, 3, True)
    # z is rounded to half a unit in 2^9.
    assert (actual - expected).abs().max() <= 2.0**-11


def test_far_from_zero_silu_is_flat(way):
    x, *vectors = make((1, 8, 6, 6), torch.float32, added=False)
    vectors[2:] = vectors[2] * 1e4, vectors[3]
    dy = draw_gradient(x, torch.float32, False)
    actual = gradient(dy, x, vectors, 2, True)
    expected = exact_gradient(dy, x, *vectors, 2, True)
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_nan_stays_in_its_group(way):
    x, *vectors = make((2, 8, 6, 6), torch.float32)
    dy = draw_gradient(x, torch.float32, False)
    dy[1, 5, 2, 3] = torch.nan
    actual = gradient(dy, x, vectors, 2, True)
    assert actual[0].isfinite().all() and actual[1, :4].isfinite().all()
    assert actual[1, 4:].isnan().all()


def test_what_is_dense_in_neither_order_is_copied(way):
    x, *vectors = make((2, 24, 9, 7), torch.float32)
    dy = draw_gradient(x, torch.float32, False)
    wide = torch.stack((dy, dy), -1)[..., 0]
    assert is_channels_last(wide) is None
    actual = gradient(wide, x, vectors, 3, True)
    assert torch.equal(actual, gradient(dy, x, vectors, 3, True))


def test_a_sample_does_not_depend_on_the_others(way):
    x, shift, *vectors = make((3, 40, 8, 8), torch.float32)
    dy = draw_gradient(x, torch.float32, False)
    together = gradient(dy, x, (shift, *vectors), 4, True)
    dy, x, shift = (t[1:2].contiguous() for t in (dy, x, shift))
    alone = gradient(dy, x, (shift, *vectors), 4, True)
    assert torch.equal(together[1:2], alone)


def test_nothing_in_nothing_out():
    x = torch.randn(2, 8, 0, 5, device=DEVICE)
    weight, statistics = torch.randn(8, device=DEVICE), torch.zeros(2, 2, 2, device=DEVICE)
    assert library.in_kernel(x, x, None, None, weight, weight, statistics, True).shape == x.shape


@pytest.mark.parametrize("shape", [(2, 8, 3, 2), (2, 8)])
def test_gradients_of_x_and_shift(shape):
    x, shift, *vectors = make(shape, torch.float64)
    leaves = x.requires_grad_(), shift.requires_grad_()
    torch.autograd.gradcheck(lambda x, s: group_norm(x, s, *vectors, 2, EPS, True), leaves)
    torch.autograd.gradcheck(lambda s: group_norm(x.detach(), s, *vectors, 2, EPS), shift)
    (dx,) = torch.autograd.grad(
        group_norm(x, shift, *vectors, 2, EPS, True).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="group_norm cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize("place", [2, 3, 4])
def test_weights_and_biases_have_no_gradients(place):
    tensors = [*make((2, 8, 3, 5), torch.float32)]
    tensors[place].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients of its weights and biases"):
        group_norm(*tensors, 2, EPS)
    with torch.no_grad():
        group_norm(*tensors, 2, EPS)


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    x, *vectors = make((2, 8, 3, 5), torch.float32, last=last)
    for leaf in (x, x.clone().requires_grad_()):
        options = (leaf, *vectors, 2, EPS, True, False)
        torch.library.opcheck(torch.ops.fbila.group_norm.default, options)
    options = (x, *vectors, 2, EPS, True, False)
    torch.library.opcheck(torch.ops.fbila.group_norm_forward.default, options)
    _, statistics = forward_in_pytorch(*options)
    backward = torch.ops.fbila.group_norm_backward.default
    torch.library.opcheck(backward, (x, x, *vectors, statistics, True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("side", [16, 64, 129, 256])
def test_the_sizes_of_stable_diffusion(dtype, last, side):
    x, *vectors = make((2, 320, side, side), dtype, last=last)
    dy = draw_gradient(x, dtype, last)
    x.requires_grad_()
    y = group_norm(x, *vectors, 32, EPS, True)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_near(first, exact_gradient(dy, x.detach(), *vectors, 32, True))

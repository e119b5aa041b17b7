"""The gradients of a gated depthwise convolution, against autograd of PyTorch in float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES

from fbila.ops import gated_conv_backward_library, gated_conv_library
from fbila.ops.gated_conv_backward_library import in_kernel, in_pytorch
from fbila.ops.gated_conv_library import gated_depthwise_conv
from fbila.ops.kernels import add_up, gated_conv_backward
from fbila.ops.kernels.gated_conv_backward import plan_gated_conv_backward
from fbila.ops.kernels.launch import Launch

from .test_gated_conv import KINDS, SHAPES, draw, exact, inputs

ALL = [True, True, True]
each_function = pytest.mark.parametrize("function", [in_kernel, in_pytorch])


def problem(shape, dtype, kept=None, bias=True):
    """dy, h, weight and bias."""
    return draw(*shape, dtype=dtype, seed=3), *inputs(shape, dtype, kept, bias)


def exact_gradients(dy, *tensors):
    leaves = [t.detach().double().requires_grad_() for t in tensors if t is not None]
    return torch.autograd.grad(exact(*leaves, *[None] * (3 - len(leaves))), leaves, dy.double())


def assert_near(actual, expected):
    # In 16 bits the gradient of the convolution's output is rounded as well, for each term.
    bound = (2 if actual.dtype.itemsize == 2 else 32) * torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


def assert_gradients(actual, tensors):
    expected = exact_gradients(*tensors)
    for x, y, like in zip(actual, expected, tensors[1:], strict=False):
        assert x.shape == like.shape and x.dtype == like.dtype and x.is_contiguous()
        assert_near(x, y)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_function
def test_they_are_exact(function, shape, dtype):
    tensors = problem(shape, dtype)
    assert_gradients(function(*tensors, ALL), tensors)


@pytest.mark.parametrize("kept", KINDS, ids=str)
@each_function
def test_weights_of_other_dtypes(function, kept):
    tensors = problem((2, 3, 5, 6), torch.float16, kept)
    for x, y, like in zip(
        function(*tensors, ALL), exact_gradients(*tensors), tensors[1:], strict=True
    ):
        assert x.dtype == like.dtype
        # However wide the weights are, du was rounded to half precision.
        bound = max(2 * torch.finfo(torch.float16).eps, torch.finfo(x.dtype).eps)
        assert (x.double() - y).abs().max() <= bound * (y.abs().max() + 1)


@pytest.mark.parametrize("needed", [1, 2, 3, 4, 5, 6], ids="{:03b}".format)
@each_function
def test_only_what_is_wanted_is_made(function, needed):
    tensors = problem((1, 5, 6, 4), torch.float32)
    wanted = [bool(needed & 1), bool(needed & 2), bool(needed & 4)]
    every = function(*tensors, ALL)
    for want, x, y in zip(wanted, function(*tensors, wanted), every, strict=True):
        assert torch.equal(x, y) if want else x.numel() == 0


@pytest.mark.parametrize("needed", range(1, 8), ids="{:03b}".format)
def test_sums_are_for_weights_alone(needed, monkeypatch):
    tensors = problem((1, 3, 4, 2), torch.float32)
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: launched.append(self.kernel.__name__))
    in_kernel(*tensors, [bool(needed & 1), bool(needed & 2), bool(needed & 4)])
    expected = ["gated_conv_kernel", "gated_conv_backward_kernel"]
    assert launched == (expected if needed == 1 else [*expected, "add_up_kernel"])


def test_sums_of_many_programs(monkeypatch):
    # Chunks of which the last one is short, strips that are not full, and several samples.
    tensors = problem((2, 17, 11, 4), torch.float64)
    shape, dtype = tensors[1].shape, torch.float64
    monkeypatch.setattr(add_up, "AT_A_TIME", 8)
    found = set()
    for programs in (1, 12, 1024):
        monkeypatch.setattr(gated_conv_backward, "_PROGRAMS", programs)
        plan_gated_conv_backward.cache_clear()
        add_up.plan_add_up.cache_clear()
        found.add(plan_gated_conv_backward(shape, dtype, dtype, (dtype, dtype))[2][0])
        assert_gradients(in_kernel(*tensors, ALL), tensors)
    plan_gated_conv_backward.cache_clear()
    add_up.plan_add_up.cache_clear()
    assert len(found) == 3 and max(found) > 2 * add_up.AT_A_TIME


def test_every_tap_is_between_the_pixels_it_joins():
    """One pixel of h and one of dy: a single tap lies between them, and meets nothing else."""
    _, h, weight, _ = problem((1, 5, 11, 1), torch.float32)
    one = torch.zeros_like(h)
    one[0, 2, 4] = h[0, 2, 4]
    for y in range(1, 4):
        for x in range(3, 6):
            dy = torch.zeros(1, 5, 11, 1, device=DEVICE)
            dy[0, y, x] = 1
            _, dweight, _ = in_kernel(dy, one, weight, None, ALL)
            (where,) = dweight[0, 0].nonzero().tolist()
            assert where == [3 - y, 5 - x]
            dh, _, _ = in_kernel(dy, h, weight, None, ALL)
            assert (dh[0, ..., 0] != 0).nonzero().tolist() == [
                [i, j] for i in range(y - 1, y + 2) for j in range(x - 1, x + 2)
            ]


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_far_from_zero(function, dtype):
    values = torch.tensor([-6e4, -200, -100, -88, -30, -1e-3, 0, 1e-3, 30, 100, 6e4])
    h = values.to(DEVICE, dtype).view(1, 1, -1, 1).expand(1, 1, -1, 2)
    weight = torch.zeros(2, 1, 3, 3, device=DEVICE, dtype=dtype)
    weight[:, :, 1, 1] = torch.tensor([1.0, 0.01])[:, None]
    dy = torch.full((1, 1, len(values), 1), 1e-3, device=DEVICE, dtype=dtype)
    dh = function(dy, h, weight, None, [True, False, False])[0]
    expected = exact_gradients(dy, h, weight, None)[0].to(dtype)
    torch.testing.assert_close(dh, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


@each_function
def test_strides_and_nothing(function):
    dy, h, weight, bias = problem((2, 3, 4, 6), torch.float32)
    expected = function(dy, h, weight, bias, ALL)
    turned = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in (dy, h)]
    for x, y in zip(function(*turned, weight, bias, ALL), expected, strict=True):
        torch.testing.assert_close(x, y)
        assert x.is_contiguous()
    for part in ((slice(0, 0),), (slice(None), slice(0, 0))):
        dh, dweight, dbias = function(dy[part], h[part], weight, bias, ALL)
        assert dh.shape == h[part].shape
        assert not dweight.any() and not dbias.any()
        assert dweight.shape == weight.shape and dbias.shape == bias.shape


def test_they_are_the_same_every_time():
    tensors = problem((2, 9, 13, 40), torch.float16)
    first = in_kernel(*tensors, ALL)
    for x, y in zip(in_kernel(*tensors, ALL), first, strict=True):
        assert torch.equal(x, y)


@pytest.fixture(params=["dispatched", "straight"])
def straight(request, monkeypatch):
    """Calls through the dispatcher, or the kernels' own, which are interpreted on the CPU."""
    if request.param == "straight":
        monkeypatch.setattr(gated_conv_library, "direct", lambda *_: True)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1)], ids=str)
def test_autograd(frozen, straight):
    dy, *tensors = problem((2, 3, 5, 4), torch.float32)
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    y = gated_depthwise_conv(*leaves)
    y.backward(dy)
    for i, (leaf, expected) in enumerate(zip(leaves, exact_gradients(dy, *tensors), strict=True)):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_near(leaf.grad, expected)


def test_three_tensors_are_kept(straight):
    tensors = [t.requires_grad_() for t in inputs((1, 3, 5, 4), torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_depthwise_conv(*tensors)
    assert [x.data_ptr() for x in kept] == [t.data_ptr() for t in tensors]
    with torch.no_grad():
        assert not gated_depthwise_conv(*tensors).requires_grad


@each_function
def test_without_a_bias(function):
    tensors = problem((2, 5, 7, 6), torch.float32, bias=False)
    *actual, dbias = function(*tensors, ALL)
    assert dbias.numel() == 0
    assert_gradients(actual, tensors)


def test_autograd_without_a_bias(straight):
    dy, h, weight, _ = problem((1, 3, 5, 4), torch.float64, bias=False)
    h.requires_grad_()
    weight.requires_grad_()
    actual = torch.autograd.grad(gated_depthwise_conv(h, weight, None), (h, weight), dy)
    for x, y in zip(actual, exact_gradients(dy, h, weight, None), strict=True):
        assert_near(x, y)


def test_second_derivatives_are_refused(straight):
    dy, h, weight, bias = problem((1, 2, 3, 2), torch.float32)
    h.requires_grad_()
    (dh,) = torch.autograd.grad(gated_depthwise_conv(h, weight, bias), h, dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="gated_depthwise_conv cannot be differentiated"):
        dh.sum().backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have no autocast")
def test_autocast_does_not_reach_pytorchs_convolutions():
    dy, *tensors = problem((1, 3, 4, 2), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    expected = torch.autograd.grad(gated_depthwise_conv(*leaves), leaves, dy)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(gated_depthwise_conv(*leaves), leaves, dy)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_opcheck():
    dy, h, weight, bias = problem((2, 3, 4, 3), torch.float32)
    op = torch.ops.fbila.gated_depthwise_conv_backward.default
    torch.library.opcheck(op, (dy, h, weight, bias, ALL))
    torch.library.opcheck(op, (dy, h, weight, None, [True, False, False]))
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    torch.library.opcheck(torch.ops.fbila.gated_depthwise_conv.default, leaves)


def test_a_graph_with_gradients_shows_the_operator():
    dy, *tensors = problem((1, 3, 4, 2), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(gated_depthwise_conv, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(gated_depthwise_conv(*leaves), leaves, dy)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves, dy), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 32, 32, 5600), (3, 30, 52, 6720), (1, 128, 128, 2048)], ids=str
)
def test_the_sizes_of_sana_and_dc_ae(dtype, shape):
    tensors = problem(shape, dtype)
    found = gated_conv_backward_library.in_kernel(*tensors, ALL)
    assert_gradients(found, tensors)
    for x, y in zip(gated_conv_backward_library.in_kernel(*tensors, ALL), found, strict=True):
        assert torch.equal(x, y)

"""A depthwise convolution of tokens and what is added to it, against PyTorch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops import depthwise_conv_library
from fbila.ops.depthwise_conv_library import (
    backward_in_kernel,
    backward_in_pytorch,
    depthwise_conv,
    in_kernel,
    in_pytorch,
)

# Channels that no block divides, strips that are not full, rows of several chunks.
SHAPES = [(2, 5, 7, 6), (1, 1, 1, 1), (3, 9, 5, 40), (1, 17, 2, 96)]
ALL = [True, True, True]
# residual, gelu, silu
PLAIN = (False, False, False)
OPTIONS = [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
each_function = pytest.mark.parametrize("function", [in_kernel, in_pytorch])
each_gradient = pytest.mark.parametrize("function", [backward_in_kernel, backward_in_pytorch])


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(shape, dtype, side=3, sets=None, kept=None):
    """x, a part of a projection, with weight, bias and addend."""
    B, H, W, C = shape
    sets, kept = sets or C, kept or dtype
    x = draw(B, H, W, 3 * C, dtype=dtype)[..., C : 2 * C]
    weight = draw(sets, 1, side, side, dtype=kept, seed=1)
    return x, weight, draw(sets, dtype=kept, seed=2), draw(*shape, dtype=dtype, seed=3)


def gate_of(x):
    """A part of another projection."""
    B, H, W, C = x.shape
    return draw(B, H, W, 4 * C, dtype=x.dtype, seed=5)[..., 3 * C :]


def exact(x, weight, bias=None, addend=None, gate=None, residual=False, gelu=False, silu=False):
    tensors = (x, weight, bias, addend, gate)
    x, weight, bias, addend, gate = (None if t is None else t.double() for t in tensors)
    x = F.gelu(x) if gelu else x
    B, H, W, C = x.shape
    if len(weight) <= C:
        weight = weight.repeat(B * C // len(weight), 1, 1, 1)
        bias = None if bias is None else bias.repeat(B * C // len(bias))
    picture = x.permute(0, 3, 1, 2).reshape(1, B * C, H, W)
    y = F.conv2d(picture, weight, bias, padding=weight.shape[-1] // 2, groups=B * C)
    y = y.view(B, C, H, W).permute(0, 2, 3, 1)
    y = y + x if residual else y
    y = y if addend is None else y + addend
    y = F.silu(y) if silu else y
    return y if gate is None else y * gate


def assert_near(actual, expected, factor=1):
    bound = factor * (1 if actual.dtype.itemsize == 2 else 16) * torch.finfo(actual.dtype).eps
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


def sets_of(kind, shape):
    B, _, _, C = shape
    return {"channels": C, "a head": max(1, C // 2), "samples": B * C}[kind]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_function
def test_it_is_exact(function, shape, side, dtype):
    x, weight, bias, addend = problem(shape, dtype, side)
    for gate in (None, gate_of(x)):
        y = function(x, weight, bias, addend, gate, *PLAIN)
        assert y.dtype == dtype and y.is_contiguous()
        assert_near(y, exact(x, weight, bias, addend, gate))


@pytest.mark.parametrize("kind", ["channels", "a head", "samples"])
@each_function
def test_who_has_taps_of_its_own(function, kind):
    shape = (3, 9, 5, 40)
    x, weight, bias, _ = problem(shape, torch.float32, sets=sets_of(kind, shape))
    assert_near(function(x, weight, None, None, None, *PLAIN), exact(x, weight))
    assert_near(function(x, weight, bias, x, x, *PLAIN), exact(x, weight, bias, x, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_function
def test_options(function, dtype, options):
    x, weight, bias, addend = problem((2, 9, 5, 8), dtype)
    for others in itertools.product((None, addend), (None, gate_of(x))):
        found = function(x, weight, bias, *others, *options)
        assert_near(found, exact(x, weight, bias, *others, *options))


@each_function
def test_what_is_beside_may_be_wider(function):
    x, weight, bias, addend = problem((2, 5, 7, 8), torch.float16)
    gate = gate_of(x)
    for others in ((addend.float() / 3, gate), (addend, gate.float() / 3), (None, gate.float())):
        y = function(x, weight.float(), bias.float(), *others, *PLAIN)
        assert y.dtype == torch.float32
        assert_near(y, exact(x, weight, bias, *others))


@each_function
def test_any_strides(function):
    x, weight, bias, addend = problem((2, 5, 7, 8), torch.float32)

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def planes(t):
        return t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    gate = gate_of(x)
    expected = exact(x, weight, bias, addend, gate)
    for first, second in ((turned, planes), (planes, turned)):
        arguments = (planes(x), weight, bias, first(addend), second(gate))
        assert_near(function(*arguments, *PLAIN), expected)
    one = gate[:, :1, :1].expand(x.shape)
    assert_near(function(x, weight, None, None, one, *PLAIN), exact(x, weight, gate=one))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("kind", ["channels", "a head", "samples"])
@each_gradient
def test_gradients_are_exact(function, kind, side, dtype):
    shape = (2, 9, 5, 40)
    x, weight, bias, dy = problem(shape, dtype, side, sets_of(kind, shape))
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(exact(*leaves), leaves, dy.double())
    for found, wanted, like in zip(
        function(dy, x, weight, bias, *PLAIN, ALL), expected, (x, weight, bias), strict=True
    ):
        assert found.dtype == like.dtype
        assert_near(found, wanted, 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@each_gradient
def test_gradients_with_options(function, dtype, options):
    x, weight, bias, dy = problem((2, 9, 5, 3), dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(exact(*leaves, None, None, *options), leaves, dy.double())
    # With SiLU the gradient of what is in it is rounded as well.
    for found, wanted in zip(function(dy, x, weight, bias, *options, ALL), expected, strict=True):
        assert_near(found, wanted, 4)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 1, 3)], ids=str)
@each_gradient
def test_gradients_of_a_sum_with_x(function, shape):
    x, weight, bias, dy = problem(shape, torch.float32)
    options = (True, False, False)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(exact(*leaves, None, None, *options), leaves, dy.double())
    for found, wanted in zip(function(dy, x, weight, bias, *options, ALL), expected, strict=True):
        assert_near(found, wanted, 2)


@pytest.mark.parametrize("needed", range(1, 8), ids="{:03b}".format)
@each_gradient
def test_only_what_is_wanted_is_made(function, needed):
    x, weight, bias, dy = problem((1, 5, 6, 4), torch.float32)
    wanted = [bool(needed & 1), bool(needed & 2), bool(needed & 4)]
    every = function(dy, x, weight, bias, *PLAIN, ALL)
    some = function(dy, x, weight, bias, *PLAIN, wanted)
    for want, found, expected in zip(wanted, some, every, strict=True):
        assert torch.equal(found, expected) if want else found.numel() == 0


def assert_gradients(function, *tensors, options=PLAIN):
    """tensors: x, weight, bias, addend and gate, of which the last two may be missing."""
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y, expected = function(*tensors, *options), exact(*tensors, *options)
    assert_near(y, expected)
    dy = draw(*y.shape, dtype=y.dtype, seed=4)
    leaves = [t for t in tensors if t is not None]
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    for leaf, found, exactly in zip(
        leaves, torch.autograd.grad(y, leaves, dy), wanted, strict=True
    ):
        assert found.dtype == leaf.dtype
        # What is between is rounded as well.
        assert_near(found, exactly, 4)


@pytest.mark.parametrize("options", [PLAIN, *OPTIONS], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_autograd(added, gated, options):
    def function(x, weight, bias, addend, gate, *options):
        named = dict(zip(("residual", "gelu", "silu"), options, strict=True))
        return depthwise_conv(x, weight, bias, addend, gate, **named)

    x, weight, bias, addend = problem((2, 5, 7, 8), torch.float64)
    others = (addend if added else None, gate_of(x) if gated else None)
    assert_gradients(function, x, weight, bias, *others, options=options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", [False, True])
def test_gradients_of_the_op_with_a_gate(monkeypatch, kernels, shape, side, dtype):
    monkeypatch.setattr(depthwise_conv_library, "direct", lambda *_: kernels)
    x, weight, bias, addend = problem(shape, dtype, side)
    op = torch.ops.fbila.depthwise_conv
    assert_gradients(op, x, weight, bias, addend, gate_of(x))
    assert_gradients(op, x, weight, bias, None, gate_of(x).float(), options=(True, True, True))


@pytest.mark.parametrize("needed", range(1, 32), ids="{:05b}".format)
def test_only_wanted_gradients_of_the_op_are_made(needed):
    x, weight, bias, addend = problem((1, 5, 6, 4), torch.float32)
    tensors = [t.detach() for t in (x, weight, bias, addend, gate_of(x))]
    leaves = [t.requires_grad_() for i, t in enumerate(tensors) if needed >> i & 1]
    found = torch.autograd.grad(
        torch.ops.fbila.depthwise_conv(*tensors, *PLAIN).square().sum(), leaves
    )
    expected = torch.autograd.grad(exact(*tensors).square().sum(), leaves)
    for one, exactly in zip(found, expected, strict=True):
        assert_near(one, exactly, 4)


def test_the_op_is_registered_in_full():
    x, weight, bias, addend = problem((2, 5, 7, 8), torch.float32)
    gate = gate_of(x)
    x, weight, bias, addend, gate = (t.requires_grad_() for t in (x, weight, bias, addend, gate))
    for arguments in (
        (x, weight, bias, addend, None, *PLAIN),
        (x, weight, bias, addend, gate, *PLAIN),
        (x, weight, bias, None, gate, True, True, True),
        (x.detach(), weight.detach(), None, addend.detach(), gate.detach(), True, False, True),
    ):
        torch.library.opcheck(torch.ops.fbila.depthwise_conv, arguments)


def test_gradients_of_gradients_are_refused():
    x, weight, bias, _ = problem((1, 3, 4, 2), torch.float32)
    x = x.detach().requires_grad_()
    y = torch.ops.fbila.depthwise_conv(x, weight, bias, None, None, *PLAIN)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        torch.autograd.grad(slope.sum(), x)


def test_bad_shapes():
    x, weight, bias, addend = problem((2, 5, 7, 8), torch.float32)
    for arguments, words in (
        ((x, weight[:3], None, None, None), "weight must be"),
        ((x, weight[:, :, :2, :2], None, None, None), "weight must be"),
        ((x, weight, bias[:3], None, None), "bias must be"),
        ((x, weight, bias, addend[:, :4], None), "addend must have"),
        ((x, weight, bias, addend, addend[..., :4]), "gate must have"),
    ):
        with pytest.raises(ValueError, match=words):
            in_kernel(*arguments, *PLAIN)


def test_empty():
    x, weight, bias, _ = problem((0, 5, 7, 8), torch.float32)
    assert in_kernel(x, weight, bias, None, None, *PLAIN).shape == x.shape
    for found in backward_in_kernel(x, x, weight, bias, *PLAIN, ALL):
        assert not found.any()


def test_results_are_the_same_every_time():
    x, weight, bias, dy = problem((3, 33, 9, 24), torch.float32)
    first = backward_in_kernel(dy, x, weight, bias, *PLAIN, ALL)
    again = backward_in_kernel(dy, x, weight, bias, *PLAIN, ALL)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

"""Multi-scale linear attention as one op, against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES
from torch.library import opcheck

from fbila.ops.lite_mla_library import lite_mla
from fbila.ops.lite_mla_passes import backward, forward, inference, tokens_of

FORMATS = (torch.contiguous_format, torch.channels_last)
EPS = 1e-3
each_format = pytest.mark.parametrize("order", FORMATS, ids=str)


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(dtype, order, *, dim=8, heads=2, scales=(5,), bias=False, size=(5, 7), B=2):
    """x and the weights, rounded to dtype."""
    inputs, outputs, wide = 6, 10, 3 * heads * dim
    shapes = [(wide, inputs, 1, 1)]
    for k in scales:
        shapes += [(wide, 1, k, k), (wide, dim, 1, 1)]
    shapes.append((outputs, (1 + len(scales)) * heads * dim, 1, 1))
    weights: list[torch.Tensor | None] = []
    for i, shape in enumerate(shapes):
        weight = draw(*shape, seed=2 * i + 1) / (shape[1] * shape[2] * shape[3]) ** 0.5
        added = draw(shape[0], dtype=dtype, seed=2 * i + 2) / 4 if bias else None
        weights += [weight.to(dtype), added]
    return draw(B, inputs, *size, dtype=dtype).contiguous(memory_format=order), weights


def exact(x, weights, dim):
    """By convolutions and an explicit (N, N) matrix."""
    B, _, H, W = x.shape
    qkv, qkv_bias, *scales, proj, proj_bias = weights
    t = F.conv2d(x, qkv, qkv_bias)
    parts = [t]
    for i in range(0, len(scales), 4):
        near, near_bias, mix, mix_bias = scales[i : i + 4]
        z = F.conv2d(t, near, near_bias, padding=near.shape[-1] // 2, groups=len(near))
        parts.append(F.conv2d(z, mix, mix_bias, groups=len(mix) // dim))
    q, k, v = torch.cat(parts, 1).reshape(B, -1, 3, dim, H * W).unbind(2)
    scores = torch.einsum("bhdi,bhdj->bhij", q.relu(), k.relu())
    o = torch.einsum("bhij,bhdj->bhdi", scores / (scores.sum(-1, keepdim=True) + EPS), v)
    return F.conv2d(o.reshape(B, -1, H, W), proj, proj_bias)


def leaves_of(x, weights):
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *weights)]
    return leaves, [t for t in leaves if t is not None]


def results(x, weights, dim, dy):
    """By `exact` in the dtype of x: the answer and the gradients."""
    (x, *weights), leaves = leaves_of(x, weights)
    y = exact(x, weights, dim)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_near(found, expected):
    for ours, truth in zip(found, expected, strict=True):
        assert ours.shape == truth.shape
        assert (ours.double() - truth).norm() <= 1e-12 * truth.norm()


CASES = [
    {},
    {"scales": ()},
    {"scales": (3, 5), "bias": True, "size": (4, 9)},
    {"heads": 1, "dim": 1, "bias": True},
    {"heads": 4, "dim": 32, "size": (9, 8)},
    {"heads": 1, "dim": 65, "scales": (3,), "bias": True, "size": (3, 2)},
    {"size": (1, 1), "bias": True},
    {"size": (1, 9), "B": 1},
    {"size": (17, 1), "B": 3},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@each_format
def test_equations(settings, order):
    dim = settings.get("dim", 8)
    x, weights = problem(torch.float64, order, **settings)
    (x, *weights), leaves = leaves_of(x, weights)
    y = lite_mla(x, weights, dim, EPS)
    dy = draw(*y.shape, seed=9)
    expected = results(x, weights, dim, dy)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert_near([y, *gradients], expected)
    with torch.no_grad():
        alone = lite_mla(x, weights, dim, EPS)
    assert_near([alone], expected[:1])
    for picture in (y, alone, gradients[0]):
        assert picture.is_contiguous(memory_format=order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_format
def test_errors_are_no_larger_than_those_of_pytorch(order, dtype):
    x, weights = problem(dtype, order, dim=16, scales=(3, 5), bias=True, size=(9, 9))
    wide = [None if t is None else t.double() for t in weights]
    (leaf, *leaf_weights), leaves = leaves_of(x, weights)
    y = lite_mla(leaf, leaf_weights, 16, EPS)
    dy = draw(*y.shape, dtype=dtype, seed=9)
    truth = results(x.double(), wide, 16, dy.double())
    plain = results(x, weights, 16, dy)
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    alone = inference(x, weights, 16, EPS)
    for ours, eager, exactly in zip(
        (alone, *found), (plain[0], *plain), (truth[0], *truth), strict=True
    ):
        assert ours.dtype == dtype and ours.shape == exactly.shape
        error, others = ((t.double() - exactly).norm() for t in (ours, eager))
        assert error <= 2 * others + 4 * torch.finfo(dtype).eps * exactly.norm()


@each_format
def test_pictures_that_are_not_dense(order):
    x, weights = problem(torch.float64, order)
    expected = exact(x, weights, 8)
    part = torch.cat((x, x), 1).contiguous(memory_format=order)[:, :6]
    turned = x.transpose(2, 3).contiguous(memory_format=order).transpose(2, 3)
    for other in (part, turned):
        assert_near([inference(other, weights, 8, EPS)], [expected])
        assert_near([forward(other, weights, 8, EPS)[0]], [expected])


@pytest.mark.parametrize("dense", [False, True])
@each_format
def test_gradients_of_any_strides(order, dense):
    x, weights = problem(torch.float64, order)
    dy = (
        draw(2, 10, 7, 5, seed=9).transpose(2, 3)
        if dense
        else draw(1, 10, 1, 1).expand(2, -1, 5, 7)
    )
    (x, *weights), leaves = leaves_of(x, weights)
    y = lite_mla(x, weights, 8, EPS)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    assert_near(found, results(x, weights, 8, dy))


@each_format
def test_only_what_is_wanted_is_made(order):
    x, weights = problem(torch.float64, order, scales=(3, 5), bias=True)
    y, *kept = forward(x, weights, 8, EPS)
    dy, count = draw(*y.shape, seed=9), 1 + len(weights)
    every = backward(dy, x, weights, *kept, 8, [True] * count)
    for i in range(count):
        needed = [i == j for j in range(count)]
        some = backward(dy, x, weights, *kept, 8, needed)
        assert torch.equal(some[i], every[i])
        assert all(t.numel() == 0 for j, t in enumerate(some) if j != i)


@each_format
def test_no_pictures(order):
    x, weights = problem(torch.float64, order)
    (x, *weights), leaves = leaves_of(x[:0], weights)
    y = lite_mla(x, weights, 8, EPS)
    assert y.shape == (0, 10, 5, 7)
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    with torch.no_grad():
        assert lite_mla(x, weights, 8, EPS).shape == (0, 10, 5, 7)


@pytest.mark.parametrize("bias", [False, True])
@each_format
def test_the_op_is_registered_in_full(order, bias):
    (x, *weights), _ = leaves_of(*problem(torch.float32, order, scales=(3,), bias=bias))
    opcheck(torch.ops.fbila.lite_mla, (x, weights, 8, EPS))
    opcheck(
        torch.ops.fbila.lite_mla, (x.detach(), [*weights[:-2], weights[-2].detach(), None], 8, EPS)
    )


def test_gradients_of_gradients_are_refused():
    (x, *weights), _ = leaves_of(*problem(torch.float32, FORMATS[0]))
    for leaf in (x, weights[0]):
        y = lite_mla(x.detach() if leaf is not x else x, weights, 8, EPS)
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            torch.autograd.grad(slope.sum(), leaf)


def test_tokens_are_views():
    for order in FORMATS:
        x = draw(2, 6, 5, 7).contiguous(memory_format=order)
        assert tokens_of(x).data_ptr() == x.data_ptr()
        assert torch.equal(tokens_of(x)[:, 8, 3], x[:, 3, 1, 1])


@pytest.mark.parametrize(
    ("place", "shape", "words"),
    [
        (0, (50, 6, 1, 1), "3 \\* dim rows for each head"),
        (0, (48, 5, 1, 1), "Weight 0 and its bias"),
        (2, (48, 1, 7, 7), "Kernels are of"),
        (4, (48, 4, 1, 1), "Weight 2 and its bias"),
        (5, (47,), "Weight 2 and its bias"),
        (6, (10, 16, 1, 1), "Weight 3 and its bias"),
    ],
)
@pytest.mark.parametrize("function", [forward, inference])
def test_refused(function, place, shape, words):
    x, weights = problem(torch.float32, FORMATS[0])
    weights[place] = draw(*shape, dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        function(x, weights, 8, EPS)


def test_other_dtypes_are_refused():
    x, weights = problem(torch.float32, FORMATS[0])
    with pytest.raises(ValueError, match="Weights must be"):
        lite_mla(x.double(), weights, 8, EPS)

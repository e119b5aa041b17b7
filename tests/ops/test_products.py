"""Products of tokens in either order, and of groups, against einsum in float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES

from fbila.ops.products import (
    BLOCK,
    multiply,
    multiply_groups,
    on_diagonal,
    together,
    weight_gradient,
    weight_gradient_of_groups,
)

each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_near(actual, expected):
    factor = 4 if actual.dtype.itemsize == 2 else 64
    bound = factor * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert actual.shape == expected.shape and (actual.double() - expected).abs().max() <= bound


def tokens(order, B, N, C, dtype, seed=0):
    """`(B, N, C)` side by side, of NCHW pictures, or a part of a wider tensor."""
    if order == "nchw":
        return draw(B, C, N, dtype=dtype, seed=seed).mT
    wide = draw(B, N, 3 * C if order == "part" else C, dtype=dtype, seed=seed)
    return wide[..., C : 2 * C] if order == "part" else wide


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("into", ["tokens", "nchw", "part"])
@pytest.mark.parametrize("order", ["tokens", "nchw", "part"])
@each_dtype
def test_multiply(dtype, order, into, bias):
    x, y = tokens(order, 3, 5, 8, dtype), tokens(into, 3, 5, 6, dtype)
    weight, added = draw(6, 8, dtype=dtype, seed=1), draw(6, dtype=dtype, seed=2)
    where = y.untyped_storage().data_ptr()
    rest = y._base.clone() if into == "part" else None
    multiply(x, weight.mT, added if bias else None, y)
    assert y.untyped_storage().data_ptr() == where
    expected = x.double() @ weight.double().mT
    assert_near(y, expected + added.double() if bias else expected)
    if rest is not None:
        assert torch.equal(y._base[..., :6], rest[..., :6])
        assert torch.equal(y._base[..., 12:], rest[..., 12:])


@pytest.mark.parametrize("N", [1, 40])
@pytest.mark.parametrize("order", ["tokens", "nchw", "part"])
@each_dtype
def test_weight_gradient(dtype, order, N):
    dy, x = tokens(order, 3, N, 8, dtype), tokens("nchw", 3, N, 6, dtype, seed=1)
    assert_near(weight_gradient(dy, x), torch.einsum("bno,bni->oi", dy.double(), x.double()))


@pytest.mark.parametrize(
    ("groups", "channels", "expected"),
    [(12, 32, 4), (6, 32, 3), (3, 32, 3), (24, 16, 8), (3, 8, 3), (5, 200, 1), (7, 32, 1)],
)
def test_as_many_groups_as_a_block_has(groups, channels, expected):
    assert together(groups, channels) == expected
    assert expected == 1 or expected * channels <= BLOCK


def test_groups_on_diagonals():
    weight = draw(12, 32, 32)
    expected = torch.stack([torch.block_diag(*part) for part in weight.split(4)])
    assert torch.equal(on_diagonal(weight), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("G", "D"), [(12, 32), (7, 32), (3, 1), (2, 130)])
@each_dtype
def test_groups(dtype, G, D, bias):
    x, wide = draw(9, G * D, dtype=dtype), draw(9, 2, G * D, dtype=dtype, seed=3)
    weight, added = draw(G, D, D, dtype=dtype, seed=1), draw(G * D, dtype=dtype, seed=2)
    rest = wide[:, 1].clone()
    multiply_groups(x, weight, added if bias else None, wide[:, 0])
    expected = torch.einsum("tgi,gio->tgo", x.view(9, G, D).double(), weight.double()).flatten(1)
    assert_near(wide[:, 0], expected + added.double() if bias else expected)
    assert torch.equal(wide[:, 1], rest)


@pytest.mark.parametrize("N", [5, 70])
@pytest.mark.parametrize(("G", "D"), [(12, 32), (7, 32), (3, 1), (2, 130)])
@each_dtype
def test_weight_gradient_of_groups(dtype, G, D, N):
    x = draw(2, N, G * D, dtype=dtype)
    dy = draw(2, N, 2, G * D, dtype=dtype, seed=1)[:, :, 1]
    found = weight_gradient_of_groups(dy, x, D)
    split = (t.double().unflatten(2, (G, D)) for t in (dy, x))
    assert found.is_contiguous()
    assert_near(found, torch.einsum("bngo,bngi->goi", *split))

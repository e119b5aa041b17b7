"""GroupNorm with what is added before it and SiLU behind it, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops import group_norm_library, group_sizes
from fbila.ops.group_norm_library import group_norm, in_kernel, in_pytorch
from fbila.ops.kernels import group_norm as split_kernels
from fbila.ops.memory_format import empty_in_order, is_channels_last

# (B, C, ...) and groups: 10 and 12 channels a group, odd sides, one position, fewer axes.
SHAPES = [
    ((2, 40, 8, 8), 4),
    ((3, 36, 5, 7), 3),
    ((1, 20, 1, 1), 5),
    ((2, 96, 17), 8),
    ((2, 6), 2),
]
EPS = 1e-5


@pytest.fixture(params=["one launch", "three launches", "three launches, merged in steps"])
def way(request, monkeypatch):
    """Small tensors take either way, the second with several tiles and parts."""
    if request.param != "one launch":
        monkeypatch.setattr(group_sizes, "LONGEST", 0)
        parts = 16 if "steps" in request.param else split_kernels.PARTS
        for name, value in (("STATISTICS", 128), ("APPLY", 128), ("PROGRAMS", 3), ("PARTS", parts)):
            monkeypatch.setattr(split_kernels, name, value)
    group_norm_library.planned.cache_clear()
    yield request.param
    group_norm_library.planned.cache_clear()


def make(shape, dtype, *, last=False, mean=0.5, added=True):
    """x, shift, x_bias, weight and bias."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size):
        normal = torch.randn(size, generator=generator, dtype=torch.float64, device=DEVICE)
        return normal.to(dtype)

    x = (1.5 * draw(*shape).double() + mean).to(dtype)
    B, C = shape[:2]
    vectors = [draw(B, C), draw(C), draw(C), draw(C)]
    if not added:
        vectors[:2] = None, None
    return in_order(x, last), *vectors


def in_order(x, last):
    return empty_in_order(x, last).copy_(x)


def exact(x, shift, x_bias, weight, bias, groups, silu):
    """In float64, as a user of PyTorch would write it."""
    ones = [1] * (x.ndim - 2)
    z = x.double()
    if shift is not None:
        z = z + shift.double().view(*shift.shape, *ones) + x_bias.double().view(-1, *ones)
    grouped = z.reshape(len(x), groups, -1)
    grouped = grouped - grouped.mean(-1, keepdim=True)
    grouped = grouped / (grouped.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = grouped.view(x.shape) * weight.double().view(-1, *ones) + bias.double().view(-1, *ones)
    return F.silu(y) if silu else y


def assert_near(actual, expected, bound=2.0):
    bound *= torch.finfo(actual.dtype).eps * (expected.abs().max() + 1)
    assert (actual.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_it_is_exact_in_the_order_of_x(way, shape, groups, dtype, last):
    x, *vectors = make(shape, dtype, last=last)
    actual = in_kernel(x, *vectors, groups, EPS, True, False)
    assert actual.dtype == dtype
    assert is_channels_last(actual) == is_channels_last(x)
    assert_near(actual, exact(x, *vectors, groups, True), 2 if dtype.itemsize == 2 else 8)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("silu", [False, True])
def test_into_channels_last(way, added, last, silu):
    x, *vectors = make((2, 40, 9, 5), torch.float32, last=last, added=added)
    actual = in_kernel(x, *vectors, 4, EPS, silu, True)
    assert is_channels_last(actual)
    # Tokens are a view.
    assert actual.permute(0, 2, 3, 1).flatten(1, 2).is_contiguous()
    assert_near(actual, exact(x, *vectors, 4, silu), 8)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("last_y", [False, True])
def test_into_another_dtype(way, dtypes, last, last_y):
    """As under autocast: each vector, too, in a dtype of its own."""
    dtype, other = dtypes
    x, *vectors = make((2, 40, 9, 5), dtype, last=last)
    vectors = [v.to(d) for v, d in zip(vectors, (*dtypes, *dtypes), strict=True)]
    expected = exact(x, *vectors, 4, True)
    for function in (in_kernel, in_pytorch):
        actual = function(x, *vectors, 4, EPS, True, last_y, other)
        assert actual.dtype == other
        assert is_channels_last(actual) == (last or last_y)
        assert_near(actual, expected, 2 if other.itemsize == 2 else 8)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_a_large_mean_does_not_cancel(way, last):
    x, *vectors = make((2, 24, 9, 7), torch.float32, last=last, mean=1000.0, added=False)
    actual = in_kernel(x, *vectors, 3, EPS, False, False)
    expected = exact(x, *vectors, 3, False)
    # The mean itself is rounded to half a unit in 2^10.
    assert (actual - expected).abs().max() <= 2 * 2.0**-14
    stock = F.group_norm(x, 3, *vectors[2:], EPS)
    assert (actual - expected).abs().max() <= 2 * (stock - expected).abs().max() + 1e-6


def test_a_large_shift_does_not_cancel(way):
    x, shift, *vectors = make((2, 24, 9, 7), torch.float32)
    shift += 300.0
    actual = in_kernel(x, shift, *vectors, 3, EPS, False, False)
    assert (actual - exact(x, shift, *vectors, 3, False)).abs().max() <= 2 * 2.0**-15


def test_a_constant_group_is_its_bias(way):
    x = torch.full((1, 8, 6, 6), 7.25, device=DEVICE)
    weight, bias = torch.ones(8, device=DEVICE), torch.arange(8.0, device=DEVICE)
    actual = in_kernel(x, None, None, weight, bias, 2, EPS, False, False)
    torch.testing.assert_close(actual, bias[None, :, None, None].expand_as(x), rtol=0, atol=1e-4)


def test_a_nan_stays_in_its_group(way):
    x, *vectors = make((2, 8, 6, 6), torch.float32)
    x[1, 5, 2, 3] = torch.nan
    actual = in_kernel(x, *vectors, 2, EPS, True, False)
    assert actual[0].isfinite().all() and actual[1, :4].isfinite().all()
    assert actual[1, 4:].isnan().all()


def test_what_is_dense_in_neither_order_is_copied(way):
    wide, *vectors = make((2, 24, 9, 14), torch.float32)
    x = wide[..., ::2]
    actual = in_kernel(x, *vectors, 3, EPS, True, False)
    assert actual.is_contiguous()
    assert torch.equal(actual, in_kernel(x.contiguous(), *vectors, 3, EPS, True, False))


def test_a_sample_does_not_depend_on_the_others(way):
    x, shift, *vectors = make((3, 40, 8, 8), torch.float32)
    together = in_kernel(x, shift, *vectors, 4, EPS, True, False)
    alone = in_kernel(x[1:2].contiguous(), shift[1:2], *vectors, 4, EPS, True, False)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("last_y", [False, True])
def test_pytorch_computes_the_same(last, last_y):
    x, *vectors = make((2, 40, 9, 5), torch.float32, last=last)
    actual = in_pytorch(x, *vectors, 4, EPS, True, last_y)
    assert is_channels_last(actual) == (last or last_y)
    assert_near(actual, exact(x, *vectors, 4, True), 8)


def test_nothing_in_nothing_out():
    x = torch.randn(2, 8, 0, 5, device=DEVICE)
    weight = torch.randn(8, device=DEVICE)
    assert in_kernel(x, None, None, weight, weight, 2, EPS, True, False).shape == x.shape


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("last_y", [False, True])
def test_opcheck(last, last_y):
    x, *vectors = make((2, 8, 3, 5), torch.float32, last=last)
    op = torch.ops.fbila.group_norm.default
    for dtype in (None, torch.float16):
        torch.library.opcheck(op, (x, *vectors, 2, EPS, True, last_y, dtype))


def test_compiles_and_exports_as_one_operator():
    x, *vectors = make((2, 8, 3, 5), torch.float32)

    class Norm(torch.nn.Module):
        def forward(self, x, *vectors):
            return group_norm(x, *vectors, 2, EPS, True)

    expected = Norm()(x, *vectors)
    compiled = torch.compile(Norm(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, *vectors), expected)
    program = torch.export.export(Norm(), (x, *vectors))
    assert sum("fbila.group_norm" in str(n.target) for n in program.graph.nodes) == 1
    assert torch.equal(program.module()(x, *vectors), expected)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(2, 7), r"shape \[2, 8\] .* got \[2, 7\]"),
        (3, torch.zeros(9), r"shape \[8\] .* got \[9\]"),
        (4, torch.zeros(8, dtype=torch.int32), "floating-point tensor .* in torch.int32"),
    ],
)
def test_tensors_that_do_not_belong_together(place, wrong, message):
    arguments = [*make((2, 8, 3, 5), torch.float32)]
    arguments[place] = wrong.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        in_kernel(*arguments, 2, EPS, True, False)


def test_groups_have_to_divide_the_channels():
    with pytest.raises(ValueError, match="got 3 and 8"):
        in_kernel(*make((2, 8, 3, 5), torch.float32), 3, EPS, True, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("side", [16, 64, 129, 256])
def test_the_sizes_of_stable_diffusion(dtype, last, side):
    x, *vectors = make((2, 320, side, side), dtype, last=last)
    actual = group_norm(x, *vectors, 32, EPS, True)
    assert torch.equal(actual, group_norm(x, *vectors, 32, EPS, True))
    assert_near(actual, exact(x, *vectors, 32, True), 2 if dtype.itemsize == 2 else 8)

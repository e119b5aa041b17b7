"""SiLU, depthwise convolution and gate in one kernel, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.gated_conv_library import gated_depthwise_conv, in_kernel, in_pytorch
from fbila.ops.kernels import gated_conv
from fbila.ops.kernels.gated_conv import plan_gated_conv

KINDS = [*DTYPES, torch.float64]
# Rows of several chunks, strips that are not full, odd channels, and pictures of one pixel.
SHAPES = [
    (2, 5, 7, 6), (1, 1, 1, 1), (1, 9, 20, 40), (2, 2, 3, 72), (1, 13, 1, 8), (1, 1, 9, 3),
    (1, 4, 5, 264), (1, 5, 29, 10),
]  # fmt: skip


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(shape, dtype, kept=None, bias=True):
    B, H, W, C = shape
    kept = kept or dtype
    h = 3 * draw(B, H, W, 2 * C, dtype=dtype)
    weight = draw(2 * C, 1, 3, 3, dtype=kept, seed=1)
    return h, weight, draw(2 * C, dtype=kept, seed=2) if bias else None


def exact(h, weight, bias):
    h, weight, bias = (None if t is None else t.double() for t in (h, weight, bias))
    picture = F.silu(h).permute(0, 3, 1, 2)
    a, g = F.conv2d(picture, weight, bias, padding=1, groups=h.shape[3]).chunk(2, 1)
    return (a * F.silu(g)).permute(0, 2, 3, 1)


def assert_near(actual, expected):
    bound = (1 if actual.dtype.itemsize == 2 else 16) * torch.finfo(actual.dtype).eps
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [in_kernel, in_pytorch, gated_depthwise_conv])
def test_it_is_exact(function, bias, shape, dtype):
    tensors = inputs(shape, dtype, bias=bias)
    actual = function(*tensors)
    assert actual.shape == shape and actual.dtype == dtype and actual.is_contiguous()
    assert_near(actual, exact(*tensors))


def test_many_rows_in_chunks(monkeypatch):
    # Whole columns, halves of them, and chunks of which the last one is short.
    tensors = inputs((1, 21, 3, 4), torch.float32)
    expected = exact(*tensors)
    found = set()
    for programs in (1, 2, 3, 1024):
        monkeypatch.setattr(gated_conv, "_PROGRAMS", programs)
        plan_gated_conv.cache_clear()
        found.add(plan_gated_conv((1, 21, 3, 4), torch.float32, (torch.float32,) * 2).numbers[3])
        assert_near(in_kernel(*tensors), expected)
    plan_gated_conv.cache_clear()
    assert found == {21, 11, 6, 3}


def test_every_tap_meets_its_neighbour_and_nothing_else():
    """A pixel alone: only neighbours see it, and each by the tap that lies there."""
    h = torch.zeros(1, 5, 11, 4, device=DEVICE)
    h[0, 2, 4] = 1
    weight = draw(4, 1, 3, 3, dtype=torch.float32)
    weight[2:] = 0
    bias = torch.tensor([0.0, 0, 5, 5], device=DEVICE)
    y = in_kernel(h, weight, bias)
    scale = F.silu(torch.tensor(1.0)) * F.silu(torch.tensor(5.0))
    expected = torch.zeros_like(y)
    expected[0, 1:4, 3:6] = scale * weight[:2, 0].flip(1, 2).permute(1, 2, 0)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kept", KINDS, ids=str)
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_weights_of_other_dtypes(function, kept):
    tensors = inputs((1, 3, 5, 6), torch.float16, kept)
    actual = function(*tensors)
    assert actual.dtype == torch.float16
    assert_near(actual, exact(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_far_from_zero(function, dtype):
    values = torch.tensor([-6e4, -200, -100, -88, -30, -1e-3, 0, 1e-3, 30, 100, 6e4])
    h = values.to(DEVICE, dtype).view(1, 1, -1, 1).expand(1, 1, -1, 2)
    weight = torch.zeros(2, 1, 3, 3, device=DEVICE, dtype=dtype)
    weight[:, :, 1, 1] = torch.tensor([1.0, 0.01])[:, None]
    y = function(h, weight, None)
    expected = exact(h, weight, None).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_what_is_not_finite_spreads_to_its_neighbours_alone(function):
    h, weight, bias = inputs((1, 7, 9, 2), torch.float32)
    h[0, 3, 4, 1] = torch.nan
    lost = function(h, weight, bias).isnan()
    expected = torch.zeros_like(lost)
    expected[0, 2:5, 3:6, 1] = True
    assert torch.equal(lost, expected)


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_strides_and_nothing(function):
    h, weight, bias = inputs((2, 3, 4, 6), torch.float32)
    other = h.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(function(other, weight, bias), function(h, weight, bias))
    assert function(other, weight, bias).is_contiguous()
    for empty in (h[:0], h[:, :0], h[:, :, :0]):
        assert function(empty, weight, bias).shape == (*empty.shape[:3], 6)


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_errors(function):
    h, weight, bias = inputs((2, 3, 4, 3), torch.float32)
    with pytest.raises(ValueError, match=r"h must be \(B, H, W, 2 C\), got \[2, 3, 4, 5\]"):
        function(h[..., 1:], weight[1:], bias[1:])
    with pytest.raises(ValueError, match=r"h must be \(B, H, W, 2 C\), got \[3, 4, 6\]"):
        function(h[0], weight, bias)
    with pytest.raises(ValueError, match=r"shape \[6, 1, 3, 3\] .* got \[6, 1, 3, 2\]"):
        function(h, weight[..., 1:], bias)
    with pytest.raises(ValueError, match=r"shape \[6\] .* got \[5\]"):
        function(h, weight, bias[1:])


def test_opcheck():
    h, weight, bias = inputs((2, 3, 4, 3), torch.float32)
    op = torch.ops.fbila.gated_depthwise_conv.default
    torch.library.opcheck(op, (h, weight, bias))
    torch.library.opcheck(op, (h.transpose(1, 2), weight, None))


def test_it_compiles_as_one_operator():
    tensors = inputs((1, 3, 4, 2), torch.float32)
    compiled = torch.compile(gated_depthwise_conv, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), gated_depthwise_conv(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 32, 32, 5600), (3, 30, 52, 6720), (1, 128, 128, 2048)], ids=str
)
def test_the_sizes_of_sana_and_dc_ae(dtype, shape):
    tensors = inputs(shape, dtype)
    assert_near(gated_depthwise_conv(*tensors), exact(*tensors))

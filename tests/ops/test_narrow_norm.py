"""Rows that one warp normalises, a program going over many, and rows just too long for that."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops.kernels import norm
from fbila.ops.kernels.norm_kernels import narrow_norm_kernel, norm_kernel
from fbila.ops.norm_library import in_kernel, plain_in_kernel
from fbila.ops.rms_norm_library import in_kernel as rms_in_kernel

EDGES = [1, 8, 255, 256, 257, 320, 512, 513, 640, 1000, 1024, 1025]
KINDS = [*DTYPES, torch.float64]


@pytest.fixture(params=[None, 2, 5], ids=["", "2 programs", "5 programs"])
def programs(request, monkeypatch):
    """As many as there are on a GPU, or few, which go over several tiles each."""
    if request.param:
        monkeypatch.setattr(norm, "PROGRAMS", request.param)
    clear()
    yield request.param
    clear()


def clear():
    norm.plan_norm.cache_clear()
    norm.plan_layer_norm.cache_clear()


def draw(*shape, dtype):
    torch.manual_seed(0)
    return (1 + 2 * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype)


def side_by_side(P, R, D, dtype):
    """x `(P, R, D)`, as the first columns of a wider product hold it, weight and bias."""
    wide = draw(R, P * D + 8, dtype=dtype)
    x = wide.as_strided((P, R, D), (D, P * D + 8, 1))
    return x, *draw(2, P, D, dtype=dtype)


def exact(x, weight, bias, slope=0.01):
    normed = F.layer_norm(x.double(), x.shape[-1:], eps=1e-5)
    return F.leaky_relu(normed * weight[:, None].double() + bias[:, None].double(), slope)


def assert_near(actual, expected):
    eps = torch.finfo(actual.dtype).eps * (1 if actual.dtype.itemsize == 2 else 8)
    assert (actual.double() - expected).abs().max() <= eps * (expected.abs().max() + 1)


@pytest.mark.parametrize("D", EDGES)
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_width_and_few_rows(programs, D, rows, dtype):
    tensors = side_by_side(2, rows, D, dtype)
    assert_near(in_kernel(*tensors, 1e-5, 0.01), exact(*tensors))


@pytest.mark.parametrize("D", [1, 3, 8, 40, 64])
def test_short_rows_of_several_tiles(programs, D):
    tensors = side_by_side(3, 700, D, torch.float32)
    assert_near(in_kernel(*tensors, 1e-5, 0.01), exact(*tensors))


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", ""])
@pytest.mark.parametrize("function", [plain_in_kernel, rms_in_kernel])
def test_without_weight_or_bias(programs, function, affine):
    x = draw(3, 11, 320, dtype=torch.float32)
    weight, bias = draw(2, 320, dtype=torch.float32)
    weight = weight if "weight" in affine else None
    bias = bias if "bias" in affine else None
    if function is rms_in_kernel:
        expected = F.rms_norm(x.double(), (320,), eps=1e-5)
    else:
        expected = F.layer_norm(x.double(), (320,), eps=1e-5)
    expected = expected if weight is None else expected * weight
    expected = expected if bias is None else expected + bias
    assert_near(function(x, weight, bias, 1e-5), expected)


@pytest.mark.parametrize("D", [40, 320, 640, 1280])
def test_a_row_depends_on_no_other_and_on_no_program(monkeypatch, D):
    x, *weights = side_by_side(2, 37, D, torch.float16)
    together = in_kernel(x, *weights, 1e-5, 0.01)
    for rows in (1, 2, 30):
        assert torch.equal(
            in_kernel(x[:, 5 : 5 + rows], *weights, 1e-5, 0.01), together[:, 5:][:, :rows]
        )
    for number in (1, 2, 7):
        monkeypatch.setattr(norm, "PROGRAMS", number)
        monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})
        clear()
        assert torch.equal(in_kernel(x, *weights, 1e-5, 0.01), together)
    clear()


def test_a_nan_stays_in_its_row(programs):
    x, *weights = side_by_side(2, 9, 320, torch.float32)
    x[1, 4, 7] = torch.nan
    nan = in_kernel(x, *weights, 1e-5, 0.01).isnan()
    assert nan[1, 4].all() and nan.sum() == 320


@pytest.mark.parametrize("D", [8, 1280])
@pytest.mark.parametrize("strides", [(2**31 + 64, 5000, 1), (5000, 2**30 + 64, 1)], ids=str)
def test_rows_far_apart(programs, strides, D):
    """On a CPU the storage of 4 GiB is hardly touched."""
    x, *weights = side_by_side(2, 3, D, torch.float16)
    far = torch.empty(2**31 + 20000, dtype=torch.float16, device=DEVICE)
    far = far.as_strided(x.shape, strides).copy_(x)
    assert torch.equal(in_kernel(far, *weights, 1e-5, 0.01), in_kernel(x, *weights, 1e-5, 0.01))


def plan(P, R, D, dtype=torch.float16):
    return norm.plan_norm((P, R, D), (R * D, D, 1), dtype, (dtype,) * 3, 1e-5, 0.01)


@pytest.mark.parametrize("D", EDGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_one_warp_has_rows_of_4096_bytes(D, dtype):
    launch = plan(2, 100000, D, dtype)
    narrow = D * (8 if dtype == torch.float64 else 4) <= 4096
    assert launch.kernel is (narrow_norm_kernel if narrow else norm_kernel)
    assert launch.options["num_warps"] == (1 if narrow else 4)
    tile = launch.constants
    assert tile.get("PIECES", 1) * tile["PIECE"] >= D


def test_programs_are_no_more_than_tiles_and_no_more_than_run_at_one_time():
    assert plan(2, 131072, 320).grid == (1320, 2, 1)
    assert plan(1, 32768, 640).grid == (2640, 1, 1)
    assert plan(1, 32768, 768).grid == (2112, 1, 1)
    assert plan(1, 32768, 1024).grid == (1980, 1, 1)
    assert plan(1, 32768, 640, torch.float32).grid == (2112, 1, 1)
    assert plan(1, 32768, 1024, torch.float32).grid == (1584, 1, 1)
    assert plan(5000, 7, 640).grid == (1, 5000, 1)
    assert plan(2, 3, 640).grid == (3, 2, 1)
    assert plan(2, 3, 320).grid == (2, 2, 1)
    assert plan(1, 8192, 1280).grid == (8192, 1, 1)


@pytest.mark.parametrize("D", EDGES)
def test_what_is_compiled_does_not_depend_on_the_number_of_rows(D):
    assert plan(1, 1, D).constants == plan(1, 3, D).constants == plan(1, 10**6, D).constants


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16384, 320), (1, 4096, 640), (2, 5000, 1024)], ids=str)
def test_the_sizes_of_stable_diffusion(shape, dtype):
    tensors = side_by_side(*shape, dtype)
    actual = in_kernel(*tensors, 1e-5, 0.01)
    assert torch.equal(actual, in_kernel(*tensors, 1e-5, 0.01))
    assert_near(actual, exact(*tensors))

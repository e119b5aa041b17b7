"""RMSNorm by the kernel of LayerNorm, against PyTorch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops import rms_norm_library
from fbila.ops.rms_norm_library import in_kernel, in_pytorch, rms_norm

KINDS = [*DTYPES, torch.float64]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, shift: float = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = shift + torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype)


def exact(x, weight, bias, eps):
    weight = None if weight is None else weight.double()
    y = F.rms_norm(x.double(), x.shape[-1:], weight, eps)
    return y if bias is None else y + bias.double()


def assert_near(actual, expected, given=None):
    """given: The dtype of x, where it is another: all but float64 is summed in float32."""
    given = given or actual.dtype
    summed = torch.finfo(torch.float64 if given == torch.float64 else torch.float32)
    bound = max(torch.finfo(actual.dtype).eps, 8 * summed.eps)
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 64), (1, 3), (7, 30), (3, 2, 2, 320)], ids=str)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", ""])
@pytest.mark.parametrize("function", [in_kernel, in_pytorch, rms_norm])
def test_it_is_exact(function, shape, affine, dtype):
    # Not around 0: the mean stays in.
    x = draw(*shape, dtype=dtype, shift=3)
    weight = draw(shape[-1], dtype=dtype, seed=1) if "w" in affine else None
    bias = draw(shape[-1], dtype=dtype, seed=2) if "b" in affine else None
    actual = function(x, weight, bias, 1e-5)
    assert actual.is_contiguous() and actual.dtype == dtype
    assert_near(actual, exact(x, weight, bias, 1e-5))


@pytest.mark.parametrize("kinds", [*itertools.product(KINDS, KINDS, (None, *KINDS))], ids=str)
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_weights_and_results_of_other_dtypes(function, kinds):
    dtype, kept, wanted = kinds
    x, weight = draw(5, 40, dtype=dtype), draw(40, dtype=kept, seed=1)
    actual = function(x, weight, weight, 1e-5, wanted)
    assert actual.dtype == (wanted or dtype)
    assert_near(actual, exact(x, weight, weight, 1e-5), dtype)


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_rows_of_zeros_and_of_what_half_precision_cannot_square(function):
    zeros = torch.zeros(2, 48, device=DEVICE, dtype=torch.float16)
    assert torch.equal(function(zeros, None, None, 1e-5), zeros)
    x = 60000 * draw(3, 48, dtype=torch.float64).sign().half()
    assert_near(function(x, None, None, 1e-5), exact(x, None, None, 1e-5))


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_strides_and_nothing(function):
    x = draw(6, 5, 16, dtype=torch.float32)
    turned = x.transpose(0, 1)
    assert torch.equal(
        function(turned, None, None, 1e-5), function(turned.contiguous(), None, None, 1e-5)
    )
    assert function(x[:0], None, None, 1e-5).shape == (0, 5, 16)
    assert function(turned, None, None, 1e-5).is_contiguous()


def test_opcheck_and_errors():
    x, weight = draw(2, 5, 16, dtype=torch.float32), draw(16, dtype=torch.float32)
    op = torch.ops.fbila.rms_norm.default
    torch.library.opcheck(op, (x, weight, weight, 1e-5))
    torch.library.opcheck(op, (x.transpose(0, 1), None, None, 1e-5))
    torch.library.opcheck(op, (x, weight, None, 1e-5, torch.float16))
    for function in (in_kernel, in_pytorch):
        with pytest.raises(ValueError, match=r"shape \[16\] .* got \[15\]"):
            function(x, weight[1:], None, 1e-5)


@pytest.mark.parametrize("straight", [False, True])
def test_gradients_are_refused_and_not_lost(straight, monkeypatch):
    monkeypatch.setattr(rms_norm_library, "direct", lambda *_: straight)
    x, weight = draw(3, 16, dtype=torch.float32), draw(16, dtype=torch.float32)
    for leaf in (x, weight):
        leaf.requires_grad_()
        with pytest.raises(NotImplementedError, match="rms_norm has no gradient"):
            rms_norm(x, weight, None, 1e-5)
        with torch.no_grad():
            rms_norm(x, weight, None, 1e-5)
        leaf.requires_grad_(False)
    assert not rms_norm(x, weight, None, 1e-5).requires_grad


def test_it_compiles_as_one_operator():
    x, weight = draw(3, 16, dtype=torch.float32), draw(16, dtype=torch.float32)

    def norm(x):
        return rms_norm(x, weight, weight, 1e-5)

    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), norm(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [512, 1024, 2240])
def test_the_widths_of_sana_and_dc_ae(dtype, width):
    x, weight = draw(3, 1000, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    assert_near(rms_norm(x, weight, weight, 1e-5), exact(x, weight, weight, 1e-5))

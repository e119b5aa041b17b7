"""Maps that keep the sign, and their gradients, against PyTorch's autograd in float64."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, DTYPES, LAYOUTS

from fbila.ops import signed_map_backward_library as backward_library
from fbila.ops.signed_map_library import in_kernel, in_pytorch, signed_map

ALL = [True, True, True]
KINDS = [*DTYPES, torch.float64]
# Heads, tokens and channels that fill no tile, several tiles, and one of each.
SHAPES = [(2, 3, 37, 8), (1, 1, 1, 1), (3, 2, 1, 5), (1, 5, 131, 3)]
MAPS = list(itertools.product(("power", "expm1"), (False, True)))
# Of a result: its own rounding, and some of float32 or float64.
ROUNDING = {torch.float16: 2**-10.9, torch.bfloat16: 2**-7.9, torch.float32: 2e-6}
both_functions = pytest.mark.parametrize("function", [in_kernel, in_pytorch])
both_gradients = pytest.mark.parametrize(
    "gradients", [backward_library.in_kernel, backward_library.in_pytorch]
)
each_map = pytest.mark.parametrize(("kind", "both"), MAPS)


def draw(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype)


def problem(shape, dtype, kind, both, kept=None):
    """x, addend and table: x is one of four in a projection."""
    B, H, N, d = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    packed = draw(B, N, 4, H, d, dtype=dtype, scale=2)
    packed[:, ::2, 1, :, :2] = 0
    addend = draw(N, H, d, dtype=kept or dtype, seed=1)
    addend[::4] = 0
    table = draw(4 if kind == "expm1" and both else 2, H, d, dtype=kept or wide, seed=2)
    table = table.sigmoid() + 0.1
    if kind == "power":
        table[1] += 1.5
    return packed[:, :, 1].transpose(1, 2), addend, table


def exact(x, addend, table, kind, both):
    """As it would be written in PyTorch, from leaves in float64, of which x + addend is rounded."""
    dtype, half = x.dtype, x.dtype == torch.float16
    z = leaf = x.detach().double()
    leaves = [leaf.requires_grad_()]
    if addend is not None:
        leaves.append(addend.detach().double().requires_grad_())
        rounded = (x.detach() + addend.detach().to(dtype).transpose(0, 1)).double()
        z = leaf + leaves[-1].transpose(0, 1)
        z = z + (rounded - z).detach()
    rows = None
    if table is not None:
        leaves.append(table.detach().double().requires_grad_())
        rows = leaves[-1].unsqueeze(-2)
    results = []
    for i, part in enumerate((z, -z)[: 1 + both]):
        if kind == "power":
            m = (part / rows[0]).abs() ** rows[1]
        else:
            exponent = part.abs()
            if rows is not None:
                exponent = exponent * torch.where(part > 0, rows[2 * i], rows[2 * i + 1])
            # Of what is infinite the gradient would be NaN.
            m = torch.expm1(exponent.clamp(max=math.log(65504)) if half else exponent)
        y = torch.copysign(m, part.detach())
        results.append(y.clamp(-65504, 65504) if half else y)
    return results, leaves


def assert_rounded(actual, expected):
    """Every entry by itself; below the normal numbers to the last bit of those."""
    rtol = ROUNDING.get(actual.dtype, 1e-12)
    tiny = max(torch.finfo(actual.dtype).smallest_normal, 1e-37) * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=rtol, atol=tiny)


def assert_near(actual, expected):
    """A sum, relative to the largest."""
    bound = max(16 * torch.finfo(torch.float32).eps, 2 * torch.finfo(actual.dtype).eps)
    if actual.dtype == torch.float64:
        bound = 1e-12
    assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1)


def upstream(y, seed):
    return draw(*y.shape, dtype=y.dtype, seed=seed, scale=0.1)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@each_map
@pytest.mark.parametrize("function", [in_kernel, in_pytorch, signed_map])
def test_it_is_exact(function, kind, both, shifted, shape, dtype):
    x, addend, table = problem(shape, dtype, kind, both)
    addend = addend if shifted else None
    actual = function(x, addend, table, kind, both)
    expected, _ = exact(x, addend, table, kind, both)
    for y, z in zip(actual, expected, strict=False):
        assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
        assert_rounded(y, z)
    assert both or actual[1].numel() == 0


@both_functions
def test_without_a_table_exponents_are_unscaled(function):
    x, _, _ = problem((2, 3, 37, 8), torch.float32, "expm1", True)
    results, (leaf,) = exact(x, None, None, "expm1", True)
    for y, z in zip(function(x, None, None, "expm1", True), results, strict=True):
        assert_rounded(y, z)
    dy = upstream(x, 3)
    gradients = backward_library.in_kernel if function is in_kernel else backward_library.in_pytorch
    dx, daddend, dtable = gradients(None, dy, x, None, None, "expm1", ALL)
    assert_rounded(dx, torch.autograd.grad(results[1], leaf, dy.double())[0])
    assert daddend.numel() == dtable.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["power", "expm1"])
def test_strides(kind, layout):
    """Read in place: what lies between is NaN."""
    x, addend, table = problem((2, 3, 37, 8), torch.float16, kind, True)
    dy, do = upstream(x, 3), upstream(x, 4)
    moved = [LAYOUTS[layout](t) for t in (dy, do, x)]
    for shifted in (None, addend):
        expected = in_kernel(x, shifted, table, kind, True)
        for y, z in zip(in_kernel(moved[2], shifted, table, kind, True), expected, strict=True):
            assert torch.equal(y, z)
        expected = backward_library.in_kernel(dy, do, x, shifted, table, kind, ALL)
        found = backward_library.in_kernel(*moved, shifted, table, kind, ALL)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert_near(found[2], expected[2].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["power", "expm1"])
@both_functions
def test_far_from_zero(function, kind, dtype):
    """In float16 what is beyond its range is its largest number, and has no gradient."""
    x = torch.tensor([-6e4, -300, -30, -11.0, -1, -1e-3, -6e-8, 0, 6e-8, 1e-3, 1, 11, 30, 300, 6e4])
    x = x.to(DEVICE, dtype).view(1, 1, -1, 1).contiguous()
    table = torch.tensor([0.5, 3.7] if kind == "power" else [0.5, 0.9], device=DEVICE)
    table = table.view(2, 1, 1)
    (y,), leaves = exact(x, None, table, kind, False)
    dy = torch.full_like(x, 1e-4)
    expected = torch.autograd.grad(y, leaves, dy.double())
    if dtype != torch.float16:
        y = y.to(dtype).double()
    actual, _ = function(x, None, table, kind, False)
    assert actual.isfinite().all() or dtype != torch.float16
    torch.testing.assert_close(actual.double(), y, rtol=max(ROUNDING[dtype], 1e-5), atol=4e-8)
    gradients = backward_library.in_kernel if function is in_kernel else backward_library.in_pytorch
    dx, _, dtable = gradients(dy, None, x, None, table, kind, ALL)
    near = x.abs() < 80
    torch.testing.assert_close(
        dx.double()[near], expected[0][near], rtol=max(ROUNDING[dtype], 1e-5), atol=1e-7
    )
    if dtype == torch.float16:
        assert not dx[x.abs() > 80].any()
        assert_near(dtable, expected[1])


@pytest.mark.parametrize("kind", ["power", "expm1"])
@both_functions
def test_what_is_not_finite_stays_where_it_is(function, kind):
    x, _, table = problem((1, 2, 9, 4), torch.float32, kind, False)
    x[0, 1, 3:6, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y, _ = function(x, None, table, kind, False)
    assert y[0, 1, 3, 2].isnan() and y[0, 1, 4, 2] == torch.inf and y[0, 1, 5, 2] == -torch.inf
    assert y.isfinite().sum() == y.numel() - 3


def test_parameters_of_other_dtypes():
    for kind, kept in itertools.product(("power", "expm1"), KINDS):
        x, addend, table = problem((2, 2, 9, 4), torch.float16, kind, False, kept)
        results, _ = exact(x, addend, table, kind, False)
        assert_rounded(in_kernel(x, addend, table, kind, False)[0], results[0])
        expected = backward_library.in_pytorch(x, None, x, addend, table, kind, ALL)
        found = backward_library.in_kernel(x, None, x, addend, table, kind, ALL)
        for actual, like, other in zip(found, (x, addend, table), expected, strict=True):
            assert actual.dtype == like.dtype
            bound = 2 * max(torch.finfo(t).eps for t in (actual.dtype, torch.float16))
            assert (actual - other).abs().max() <= bound * other.abs().max()


@both_functions
def test_nothing_and_errors(function):
    x, addend, table = problem((2, 3, 5, 4), torch.float32, "power", False)
    assert function(x[:0], addend, table, "power", True)[1].shape == (0, 3, 5, 4)
    gradients = backward_library.in_kernel if function is in_kernel else backward_library.in_pytorch
    dx, daddend, dtable = gradients(x[:0], None, x[:0], addend, table, "power", ALL)
    assert dx.shape == (0, 3, 5, 4) and not daddend.any() and not dtable.any()
    with pytest.raises(ValueError, match=r"x must be \(B, H, N, d\), got \[3, 5, 4\]"):
        function(x[0], addend, table, "power", False)
    with pytest.raises(ValueError, match=r"kind must be .*, got 'sine'"):
        function(x, addend, table, "sine", False)
    with pytest.raises(ValueError, match="with a table"):
        function(x, addend, None, "power", False)
    with pytest.raises(ValueError, match=r"shape \[4, 3, 4\] .* got \[2, 3, 4\]"):
        function(x, addend, table, "expm1", True)
    with pytest.raises(ValueError, match=r"shape \[5, 3, 4\] .* got \[4, 3, 4\]"):
        function(x, addend[1:], table, "power", True)


@each_map
def test_opcheck(kind, both):
    x, addend, table = problem((2, 3, 4, 3), torch.float32, kind, both)
    torch.library.opcheck(torch.ops.fbila.signed_map.default, (x, addend, table, kind, both))
    other = x if both else None
    op = torch.ops.fbila.signed_map_backward.default
    torch.library.opcheck(op, (x, other, x, addend, table, kind, ALL))
    leaves = [t.detach().requires_grad_() for t in (x, addend, table)]
    torch.library.opcheck(torch.ops.fbila.signed_map.default, (*leaves, kind, both))

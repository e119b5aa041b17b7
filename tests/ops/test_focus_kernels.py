"""The focused map's kernels: what all heads of a token share, and the gradient through the map."""

import pytest
import torch
from helpers import DEVICE, DTYPES, LAYOUTS, RAILS, make_qkv

from fbila.ops.kernels.focus import launch_focus_rows
from fbila.ops.kernels.grad_focus import launch_focus_gradient

NAN = float("nan")
KINDS = [*DTYPES, torch.float64]

each_dtype = pytest.mark.parametrize("dtype", KINDS, ids=str)
each_power = pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 3.7, 8.0])


def focus(x, columns, power):
    """f, the largest channel of x^, w and ||u||^2, as the formulas have them."""
    x = (torch.relu(x) + 1e-6) * columns[:, None]
    top = x.detach().amax((1, 3), keepdim=True)
    y = (x / top) ** power
    w = (x.square().sum((1, 3), keepdim=True) / y.square().sum((1, 3), keepdim=True)).sqrt()
    return y * w, top, w, (x / top).square().sum((1, 3), keepdim=True)


def along(df, dtype):
    """What the gradient kernel is given as the sum of df over heads and channels."""
    return df.double().sum((1, 3)).to(dtype)


def make(shape, dtype, magnitude=1.0):
    """x, df, columns and a mask of the tokens, of which item 0 keeps all."""
    B, H, N, K = shape
    x, _, _, df = make_qkv((B, H, N, N, K, K), dtype)
    generator = torch.Generator(DEVICE).manual_seed(1)
    columns = torch.rand(H, K, generator=generator, dtype=torch.float64, device=DEVICE) + 0.5
    mask = torch.rand(B, N, generator=generator, device=DEVICE) < 0.7
    mask[0] = True
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return x * magnitude, df, columns.to(sums), mask


def assert_near(actual, truth, dtype, size=None):
    """Within twice the rail of `dtype`, as a share of each token's largest entry, or of `size`."""
    size = truth.abs().amax((1, 3), keepdim=True) if size is None else size
    error = (actual.double() - truth).abs()
    bound = 2 * RAILS[dtype][1] * size + torch.finfo(actual.dtype).smallest_normal
    assert (error <= bound).all(), f"{dtype}: {(error / bound).max():.2f} of the bound"


def check(x, df, columns, power, mask=None):
    """Rows and both gradients against autograd in float64. Where mask is False, x may be NaN."""
    B, H, N, K = x.shape
    factors = x.new_ones(H, K, dtype=torch.float64) if columns is None else columns.double()
    numbers = None if mask is None else mask.to(x.dtype)
    keep = torch.ones(B, N, dtype=torch.bool, device=x.device) if mask is None else mask
    keep = keep[:, None, :, None]
    leaf = x.double().masked_fill(~keep, 0).requires_grad_()
    factors.requires_grad_()
    f, top, w, squares = focus(leaf, factors, power)
    df.copy_(df * (f / f.amax()).detach())
    cotangent = (df.double() / f.detach()).masked_fill(~keep, 0)
    gradients = torch.autograd.grad(f, [leaf, factors], cotangent)

    rows = launch_focus_rows(x, columns, numbers, power)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert rows.shape == (B, 3, N) and rows.dtype == sums
    for row, expected in zip(rows.unbind(1), (1 / top, w, squares), strict=True):
        assert_near(row[:, None, :, None], expected.detach(), sums)

    # Sums over the token cancel, and so do those over tokens: errors are relative to their terms.
    with torch.no_grad():
        hat = (leaf.relu() + 1e-6) * factors[:, None]
        slope = power * w / top * (hat / top) ** (power - 1)
        length = hat.square().sum((1, 3), keepdim=True)
        share = (f * cotangent).abs().sum((1, 3), keepdim=True) / length
        term = slope * (cotangent.abs() + f * share) + hat * share
        dx_size = (term * factors[:, None]).amax((1, 3), keepdim=True)
        column_size = (term * hat / factors[:, None]).sum((0, 2)).max()
    parts = launch_focus_gradient(x, df, columns, rows, along(df, sums), numbers, power)
    assert_near(df, gradients[0], x.dtype, dx_size)
    assert not df.masked_select(~keep).any()
    if columns is None:
        assert parts is None
    else:
        dcolumns = parts.sum(0)
        assert dcolumns.shape == columns.shape and dcolumns.dtype == sums
        assert_near(dcolumns, gradients[1], sums, column_size)


@each_dtype
@each_power
@pytest.mark.parametrize("scaled", [False, True])
def test_the_formulas(scaled, power, dtype):
    x, df, columns, _ = make((2, 3, 37, 16), dtype)
    check(x, df, columns if scaled else None, power)


@each_dtype
@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("K", [5, 40, 64, 160, 256])
@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
def test_every_shape(layout, K, H, dtype):
    x, df, columns, _ = make((1, H, 19, K), dtype)
    if layout != "contiguous":
        x, df = LAYOUTS[layout](x), LAYOUTS[layout](df)
    check(x, df, columns, 3.0)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_df", ["token_major", "token_contiguous", "sliced_last_dim"])
def test_every_layout(of_x, of_df):
    x, df, columns, _ = make((2, 2, 35, 24), torch.float32)
    check(LAYOUTS[of_x](x), LAYOUTS[of_df](df), columns, 3.0)


@each_dtype
@pytest.mark.parametrize("power", [3.0, 3.7])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_masked_token_is_not_read(scaled, power, dtype):
    x, df, columns, mask = make((3, 2, 70, 20), dtype)
    for tensor in (x, df):
        tensor.masked_fill_(~mask[:, None, :, None], NAN)
    check(x, df, columns if scaled else None, power, mask)


@each_power
@pytest.mark.parametrize(
    "dtype, magnitude", [(torch.float16, 1.5e4), (torch.float32, 1e29), (torch.float32, 1e-29)]
)
def test_sizes_at_the_end_of_the_range(dtype, magnitude, power):
    x, df, columns, _ = make((1, 2, 40, 24), dtype, magnitude)
    check(x, df, columns, power)


def test_nan_stays_in_its_token():
    x, df, columns, _ = make((1, 2, 9, 8), torch.float32)
    x[0, 0, 3, 2] = NAN
    rows = launch_focus_rows(x, columns, None, 3.0)
    launch_focus_gradient(x, df, columns, rows, along(df, rows.dtype), None, 3.0)
    others = torch.arange(9, device=DEVICE) != 3
    assert rows[0, 1, 3].isnan() and df[0, 1, 3].isnan().any()
    assert rows[:, :, others].isfinite().all() and df[:, :, others].isfinite().all()


def test_two_runs_are_the_same(monkeypatch):
    # Several blocks of tokens for a program, as long inputs give it.
    monkeypatch.setattr("fbila.ops.kernels.grad_focus.ENOUGH_PROGRAMS", 3)
    x, df, columns, mask = make((2, 3, 150, 64), torch.float16)
    x, df, mask = LAYOUTS["token_major"](x), LAYOUTS["token_major"](df), mask.to(x.dtype)
    results = []
    for gradient in (df.clone(), df.clone()):
        rows = launch_focus_rows(x, columns, mask, 3.0)
        sums = along(gradient, rows.dtype)
        dcolumns = launch_focus_gradient(x, gradient, columns, rows, sums, mask, 3.0)
        results.append((rows, gradient, dcolumns))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    check(x, df, columns, 3.0, mask != 0)

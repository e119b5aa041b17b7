"""Softmax attention in windows of a grid by one kernel, against timm's in float64."""

import pytest
import timm.models.swin_transformer as timm
import torch
from helpers import DEVICE, DTYPES

from fbila.ops import window_attention_library as library
from fbila.ops.window_attention_library import (
    backward_in_kernel,
    backward_in_pytorch,
    by_pytorch,
    in_kernel,
    in_pytorch,
    window_attention,
)

# (B, H, W), heads, channels of a head, window, shift.
CASES = [
    ((2, 14, 14), 2, 32, (7, 7), (0, 0)),
    ((3, 14, 14), 3, 32, (7, 7), (3, 3)),
    ((2, 9, 16), 2, 8, (7, 7), (3, 3)),
    ((2, 10, 5), 1, 24, (4, 6), (2, 3)),
    ((1, 16, 8), 2, 64, (8, 8), (4, 0)),
    # Smaller than the window, and than the shift.
    ((1, 2, 3), 2, 16, (7, 7), (3, 3)),
    ((1, 1, 1), 1, 3, (1, 1), (0, 0)),
]
# What no kernel is for: more than 64 tokens, and more than 64 channels.
UNSERVED = [((1, 12, 13), 1, 8, (12, 12), (6, 6)), ((1, 4, 4), 1, 80, (2, 2), (1, 1))]


def draw(grid, heads, d, window, dtype=torch.float64, filled=True):
    torch.manual_seed(0)
    C, numbers = heads * d, (2 * window[0] - 1) * (2 * window[1] - 1)
    qkv, table, fill = torch.randn(*grid, 3 * C), torch.randn(numbers, heads), torch.randn(3 * C)
    qkv, table, fill = (t.to(DEVICE, dtype) for t in (qkv, table, fill))
    return qkv, table, fill if filled else None


def exact(qkv, table, fill, window, shift):
    """As timm's block does around its attention, from grid to windows and back."""
    B, H, W, _ = qkv.shape
    heads = table.shape[1]
    size = H + -H % window[0], W + -W % window[1]
    grid = qkv.new_zeros(B, *size, qkv.shape[3]) + (0 if fill is None else fill)
    grid[:, :H, :W] = qkv.roll((-shift[0], -shift[1]), (1, 2))
    attention = timm.WindowAttention(3 * heads, heads, window_size=window)
    del attention.relative_position_bias_table
    attention.relative_position_bias_table = table
    block = timm.SwinTransformerBlock(3 * heads, size, heads, window_size=window, dynamic_mask=True)
    block.shift_size = shift
    parts = timm.window_partition(grid, window).flatten(1, 2)
    q, k, v = parts.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + attention._get_rel_pos_bias()
    if any(shift):
        mask = block.get_attn_mask(grid).to(logits)
        logits = (logits.unflatten(0, (B, -1)) + mask[:, None]).flatten(0, 1)
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = timm.window_reverse(y.unflatten(1, window), window, *size)
    return y[:, :H, :W].roll(shift, (1, 2))


def assert_near(actual, expected, terms=1):
    """terms: How many rounded numbers a sum is of."""
    eps = torch.finfo(actual.dtype).eps * (2 if actual.dtype.itemsize == 2 else 32)
    assert actual.shape == expected.shape and actual.isfinite().all()
    bound = eps * terms**0.5 * (expected.abs().max() + 1)
    assert (actual.double() - expected).abs().max() <= bound


def wide(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(("grid", "heads", "d", "window", "shift"), CASES, ids=str)
@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
def test_it_is_exact(function, grid, heads, d, window, shift, filled, dtype):
    tensors = draw(grid, heads, d, window, dtype, filled)
    y = function(*tensors, window, shift)
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, exact(*wide(*tensors), window, shift).detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(("grid", "heads", "d", "window", "shift"), CASES, ids=str)
@pytest.mark.parametrize("function", [backward_in_kernel, backward_in_pytorch])
def test_gradients_are_exact(function, grid, heads, d, window, shift, filled, dtype):
    qkv, table, fill = draw(grid, heads, d, window, dtype, filled)
    # As under autocast.
    table, fill = table.float(), None if fill is None else fill.float()
    dy = torch.randn(*grid, heads * d).to(DEVICE, dtype)
    actual = function(dy, qkv, table, fill, window, shift)
    leaves = wide(qkv, table, fill)
    y = exact(*leaves, window, shift)
    expected = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.double())
    windows = grid[0] * -(-grid[1] // window[0]) * -(-grid[2] // window[1])
    # What is summed has been rounded to qkv's dtype on the way.
    rounded = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for i, (got, want) in enumerate(zip(actual, expected, strict=False)):
        assert got.dtype == (dtype if i == 0 else torch.float32)
        assert_near(got, want, 4 if i == 0 else 4 * windows * rounded**2)
    assert filled or not actual[2].numel()
    if function is backward_in_kernel:
        again = function(dy, qkv, table, fill, window, shift)
        assert all(torch.equal(*pair) for pair in zip(actual, again, strict=True))


@pytest.mark.parametrize("function", [in_kernel, in_pytorch])
@pytest.mark.parametrize(("grid", "heads", "d", "window", "shift"), UNSERVED, ids=str)
def test_others_are_pytorchs(function, grid, heads, d, window, shift):
    tensors = draw(grid, heads, d, window, torch.float32)
    assert not library.served(tensors[0], tensors[1], window)
    expected = exact(*wide(*tensors), window, shift)
    assert_near(function(*tensors, window, shift), expected.detach())


def test_a_program_has_several_pictures(monkeypatch):
    from fbila.ops.kernels import window_attention, window_attention_backward

    plans = (
        window_attention.plan_window_attention,
        window_attention_backward.plan_grad_window_attention,
    )
    for module in (window_attention, window_attention_backward):
        monkeypatch.setattr(module, "MULTIPROCESSORS", 1)
    for plan in plans:
        plan.cache_clear()
    window, shift = (7, 7), (3, 3)
    tensors = draw((5, 9, 14), 2, 16, window, torch.float32)
    dy = torch.randn(5, 9, 14, 32, device=DEVICE)
    y = in_kernel(*tensors, window, shift)
    gradients = backward_in_kernel(dy, *tensors, window, shift)
    for plan in plans:
        plan.cache_clear()
    leaves = wide(*tensors)
    expected = exact(*leaves, window, shift)
    assert_near(y, expected.detach())
    for got, want in zip(
        gradients, torch.autograd.grad(expected, leaves, dy.double()), strict=True
    ):
        assert_near(got, want, 64)


def test_tensors_that_are_not_dense():
    window, shift = (4, 4), (2, 2)
    qkv, table, fill = draw((2, 8, 12), 2, 16, window, torch.float32)
    expected = in_kernel(qkv, table, fill, window, shift)
    apart = torch.stack((qkv, qkv), -1)[..., 0], table.t().contiguous().t(), fill
    assert torch.equal(in_kernel(*apart, window, shift), expected)
    dy = torch.randn_like(expected)
    expected = backward_in_kernel(dy, qkv, table, fill, window, shift)
    got = backward_in_kernel(dy.mT.contiguous().mT, *apart, window, shift)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_table_that_has_changed_is_read_anew():
    window, shift = (2, 2), (0, 0)
    qkv, table, _ = draw((1, 4, 4), 2, 16, window, torch.float32)
    before = in_kernel(qkv, table, None, window, shift)
    table.mul_(2)
    y = in_kernel(qkv, table, None, window, shift)
    assert not torch.equal(y, before)
    assert torch.equal(y, in_kernel(qkv, table.clone(), None, window, shift))
    # Which no counter tells of.
    table.data.mul_(0.5)
    assert torch.equal(in_kernel(qkv, table, None, window, shift), before)


def test_gradients_through_the_op():
    window, shift = (3, 2), (1, 1)
    leaves = [t.requires_grad_() for t in draw((2, 4, 3), 2, 3, window)]
    op = torch.ops.fbila.window_attention
    torch.autograd.gradcheck(lambda *t: op(*t, window, shift), leaves)
    torch.autograd.gradcheck(lambda x: op(x, leaves[1].detach(), None, window, shift), leaves[:1])
    (dx,) = torch.autograd.grad(op(*leaves, window, shift).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="window_attention cannot be differentiated twic"):
        dx.sum().backward()


def test_dropout_is_pytorchs():
    window, shift = (4, 4), (0, 0)
    qkv, table, fill = draw((2, 8, 8), 2, 16, window, torch.float32)
    dropped = window_attention(qkv, table, fill, window, shift, 0.5)
    assert not torch.allclose(dropped, window_attention(qkv, table, fill, window, shift))
    none = window_attention(qkv, table, fill, window, shift, 1.0)
    assert not none.any()


def test_nothing_in_nothing_out():
    window, shift = (4, 4), (2, 2)
    qkv, table, fill = draw((0, 8, 8), 2, 16, window, torch.float32)
    assert in_kernel(qkv, table, fill, window, shift).shape == (0, 8, 8, 32)
    gradients = backward_in_kernel(qkv[..., :32], qkv, table, fill, window, shift)
    assert not any(t.any() for t in gradients)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("side", [14, 32])
@pytest.mark.parametrize("shift", [(0, 0), (3, 3)])
def test_real_sizes(shift, side, dtype):
    """It errs by no more than PyTorch's operations, of which each rounds."""
    window = (7, 7)
    qkv, table, fill = draw((64, side, side), 12, 32, window, dtype)
    dy = torch.randn(64, side, side, 384, device=DEVICE).to(dtype)
    found = []
    for run, kind in (
        (window_attention, dtype),
        (by_pytorch, dtype),
        (by_pytorch, torch.float64),
    ):
        leaves = [t.detach().to(kind).requires_grad_() for t in (qkv, table, fill)]
        y = run(*leaves, window, shift)
        # Where windows end with the grid, there is nothing beyond.
        found.append((y, *torch.autograd.grad(y, leaves, dy.to(kind), materialize_grads=True)))
    for ours, theirs, exactly in zip(*found, strict=True):
        # What is beyond the grid may be hidden from all of it, but for exp(-100).
        scale = exactly.norm().clamp_min(1e-20)
        least = 2 * torch.finfo(dtype).eps
        error, plain = ((t.double() - exactly).norm() / scale for t in (ours, theirs))
        assert error <= max(1.1 * plain, least)


def test_opcheck_and_errors():
    window, shift = (4, 4), (2, 2)
    tensors = draw((2, 8, 9), 2, 16, window, torch.float32)
    op = torch.ops.fbila.window_attention.default
    backward = torch.ops.fbila.window_attention_backward.default
    for fill in (tensors[2], None):
        torch.library.opcheck(op, (*tensors[:2], fill, window, shift))
        leaves = [None if t is None else t.clone().requires_grad_() for t in (*tensors[:2], fill)]
        torch.library.opcheck(op, (*leaves, window, shift))
        dy = torch.randn(2, 8, 9, 32, device=DEVICE)
        torch.library.opcheck(backward, (dy, *tensors[:2], fill, window, shift))
    qkv, table, fill = tensors
    for wrong, message in (
        ((qkv[..., 1:], table, fill, window, shift), "qkv must be"),
        ((qkv, table[1:], fill, window, shift), "table must have 49 rows"),
        ((qkv, table, fill, window, (-1, 0)), "no shift be negative"),
        ((qkv, table, fill[1:], window, shift), r"fill must be \(96,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            in_kernel(*wrong)


def test_under_autocast():
    """As timm's: the logits are sums with a table of float32, and so is softmax."""
    window, shift = (4, 4), (2, 2)
    qkv, table, fill = draw((2, 8, 8), 2, 16, window, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = window_attention(qkv.bfloat16(), table, fill, window, shift)
    assert y.dtype == torch.bfloat16
    assert_near(y, exact(*wide(qkv.bfloat16(), table, fill), window, shift).detach(), 4)

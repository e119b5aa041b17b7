"""Positions of the keys, which the kernels of focused attention add, are as if added before."""

import pytest
import torch
from helpers import CUDA, DEVICE, DTYPES, LAYOUTS, RAILS, assert_equations, make_qkv

from fbila import focused_la
from fbila.ops import focused_library

SHAPE = (2, 3, 5, 7, 4, 6)  # B, H, N, M, K, V
NAMES = ("o", "dq", "dk", "dv", "dscale", "dpositions")

each_impl = pytest.mark.parametrize("impl", ["reference", "triton"])
each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)


def make(shape, dtype, seed=0):
    """q, k, v, scale, positions and do."""
    _, H, _, M, K, _ = shape
    q, k, v, do = make_qkv(shape, dtype, seed=seed)
    made = {"generator": torch.Generator(DEVICE).manual_seed(seed + 1), "device": DEVICE}
    scale = torch.randn(H, K, dtype=torch.float64, **made).to(torch.promote_types(dtype, DTYPES[0]))
    positions = torch.randn(H, M, K, dtype=torch.float64, **made).to(dtype)
    return q, k, v, scale, positions, do


def attend(q, k, v, scale, positions, **options):
    return focused_la(q, k, v, scale=scale, key_positions=positions, **options)


def added_before(q, k, v, scale, positions, **options):
    return focused_la(q, k + positions, v, scale=scale, **options)


def results(function, inputs, do, **options):
    """o and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def assert_as_accurate(inputs, do, mask=None):
    """Errors against float64 are no larger than with the positions added by PyTorch."""
    wide = results(added_before, [x.double() for x in inputs], do, key_mask=mask, impl="reference")
    before = results(added_before, inputs, do, key_mask=mask, impl="triton")
    actual = results(attend, inputs, do, key_mask=mask, impl="triton")
    for name, x, y, truth in zip(NAMES, actual, before, wide, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        error, usual = ((z.double() - truth).abs().max() for z in (x, y))
        rail = RAILS[x.dtype][name != "o"] * truth.abs().max()
        assert error <= 1.5 * usual + 0.1 * rail, f"{name}: {error:.2e} where it was {usual:.2e}"


@each_dtype
@pytest.mark.parametrize("K, V", [(4, 6), (32, 32), (40, 24), (80, 80), (160, 130)])
def test_every_width(K, V, dtype):
    *inputs, do = make((2, 2, 35, 70, K, V), dtype)
    assert_as_accurate(inputs, do)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_layout(masked, layout):
    q, k, v, scale, positions, do = make((3, 2, 35, 41, 24, 24), torch.float32)
    q, k, v = (LAYOUTS[layout](x) for x in (q, k, v))
    mask = torch.arange(3 * 41, device=DEVICE).view(3, 41) % 5 != 1 if masked else None
    assert_as_accurate((q, k, v, scale, positions), do, mask)


@each_impl
@pytest.mark.parametrize("of", ["a parameter of tokens", "every second number", "one head for all"])
def test_positions_that_are_views(of, impl):
    q, k, v, scale, positions, do = make(SHAPE, torch.float64)
    if of == "a parameter of tokens":
        positions = positions.transpose(0, 1).contiguous().transpose(0, 1)
    elif of == "every second number":
        positions = positions.repeat_interleave(2, -1)[..., ::2]
    else:
        positions = positions[:1].expand(3, -1, -1)
    inputs = (q, k, v, scale, positions)
    actual = results(attend, inputs, do, impl=impl)
    for x, y in zip(actual, results(added_before, inputs, do, impl="reference"), strict=True):
        assert_equations(x, y)


@each_impl
@pytest.mark.parametrize("of_keys", DTYPES, ids=str)
@pytest.mark.parametrize("of_positions", [*DTYPES, torch.float64], ids=str)
def test_positions_are_cast_to_the_dtype_of_the_keys(of_positions, of_keys, impl):
    q, k, v, scale, positions, do = make(SHAPE, of_keys)
    positions = positions.double().add(1e-4).to(of_positions)
    *actual, gradient = results(attend, (q, k, v, scale, positions), do, impl=impl)
    cast = (q, k, v, scale, positions.to(of_keys))
    *expected, of_cast = results(attend, cast, do, impl=impl)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(gradient, of_cast.to(of_positions))


@each_impl
def test_autocast(impl):
    q, k, v, scale, positions, _ = make(SHAPE, torch.float32)
    low = DTYPES[-1]
    with torch.autocast(DEVICE, dtype=low):
        o = attend(q, k, v, scale, positions, impl=impl)
    q, k, v, positions = (x.to(low) for x in (q, k, v, positions))
    assert torch.equal(o, attend(q, k, v, scale, positions, impl=impl))


@each_impl
def test_a_masked_key_is_absent_with_its_position(impl):
    q, k, v, scale, positions, do = make(SHAPE, torch.float64)
    mask = torch.arange(7, device=DEVICE).expand(2, 7) < 4
    k[:, :, 4:], positions[:, 4:] = float("inf"), float("nan")
    actual = results(attend, (q, k, v, scale, positions), do, key_mask=mask, impl=impl)
    short = (q, k[:, :, :4], v[:, :, :4], scale, positions[:, :4])
    expected = results(added_before, short, do, impl="reference")
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        if name in ("dk", "dv", "dpositions"):
            assert not x[..., 4:, :].any(), name
            x = x[..., :4, :]
        assert_equations(x, y)


@each_impl
@pytest.mark.parametrize("layout", [None, "token_major"])
def test_the_gradient_of_positions_alone(layout, impl):
    q, k, v, scale, positions, do = make(SHAPE, torch.float64)
    if layout:
        q, k, v, do = (LAYOUTS[layout](x) for x in (q, k, v, do))
    expected = results(added_before, (q, k, v, scale, positions), do, impl="reference")[-1]
    positions.requires_grad_()
    (actual,) = torch.autograd.grad(attend(q, k, v, scale, positions, impl=impl), positions, do)
    assert_equations(actual, expected)


def test_sums_over_items_are_a_kernels(monkeypatch):
    """PyTorch's take several times as long."""
    sums, made = focused_library.column_sums, []
    monkeypatch.setattr(focused_library, "column_sums", lambda x: made.append(x.shape) or sums(x))
    q, k, v, scale, positions, do = make(SHAPE, torch.float32)
    q, k, v = (LAYOUTS["packed_qkv"](x) for x in (q, k, v))
    results(attend, (q, k, v, scale, positions), do, impl="triton")
    assert made == [(2, 7 * 3 * 4)]


@pytest.mark.parametrize("B", [1, 33, 70])
def test_gradients_of_many_items(B):
    *inputs, do = make((B, 1, 2, 3, 4, 2), torch.float16)
    assert_as_accurate([LAYOUTS["token_major"](x) for x in inputs[:3]] + inputs[3:], do)


@each_impl
@pytest.mark.parametrize("empty", ["B", "H", "N", "M", "V"])
def test_empty(empty, impl):
    sizes = zip("BHNMKV", SHAPE, strict=True)
    *inputs, do = make([0 if name == empty else n for name, n in sizes], torch.float32)
    o, *gradients = results(attend, inputs, do, impl=impl)
    assert o.shape == do.shape and not o.any()
    for gradient, x in zip(gradients, inputs, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def test_on_the_meta_device():
    inputs = [x.to("meta").requires_grad_() for x in make(SHAPE, torch.float16)]
    o = attend(*inputs[:5], impl="triton")
    gradients = torch.autograd.grad(o, inputs[:5], inputs[5])
    assert all(x.is_meta and x.shape == y.shape for x, y in zip(gradients, inputs, strict=False))


@pytest.mark.skipif(not CUDA, reason="the interpreter is too slow")
def test_the_size_of_flatten_swin():
    q, k, v, scale, positions, do = make((64, 3, 3136, 3136, 32, 32), torch.bfloat16)
    q, k, v, do = (LAYOUTS["token_major"](x) for x in (q, k, v, do))
    assert_as_accurate((q, k, v, scale, positions), do)

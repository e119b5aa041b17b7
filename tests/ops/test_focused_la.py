"""Focused linear attention is the formula of FLatten, with norms over all heads of a token."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_derivatives,
    assert_equations,
    assert_on_rail,
    make_qkv,
)

from fbila import focused_la

IMPLEMENTATIONS = ["reference", "triton"]
SHAPE = (2, 3, 5, 7, 4, 6)  # B, H, N, M, K, V

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_factor = pytest.mark.parametrize("focusing_factor", [1, 2.5, 3, 8])


def make_scale(H=3, K=4, dtype=torch.float64):
    generator = torch.Generator(DEVICE).manual_seed(6)
    return torch.randn(H, K, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype)


def focused_token(x, scale, p):
    """f of one token `(H, K)`."""
    x = x.clamp(min=0) + 1e-6
    if scale is not None:
        x = x / torch.log(1 + torch.exp(scale))
    power = x**p
    return power * (x.pow(2).sum() / power.pow(2).sum()).sqrt()


def by_hand(q, k, v, scale=None, p=3, eps=1e-6):
    """One item, head and query after the other."""
    B, H, N, _ = q.shape
    M, V = v.shape[2:]
    o = v.new_empty(B, H, N, V)
    for b in range(B):
        f = [focused_token(q[b, :, i], scale, p) for i in range(N)]
        g = [focused_token(k[b, :, j], scale, p) for j in range(M)]
        for h in range(H):
            for i in range(N):
                weights = [f[i][h] @ g[j][h] / M for j in range(M)]
                numerator = sum(w * v[b, h, j] for j, w in enumerate(weights))
                o[b, h, i] = numerator / (sum(weights) + eps)
    return o


@each_impl
@each_factor
@pytest.mark.parametrize("scaled", [False, True])
def test_the_formula(scaled, focusing_factor, impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    scale = make_scale() if scaled else None
    options = {"focusing_factor": focusing_factor, "scale": scale, "eps": 0.01, "impl": impl}
    expected = by_hand(q, k, v, scale, focusing_factor, eps=0.01)
    assert_equations(focused_la(q, k, v, **options), expected)


@each_impl
def test_the_defaults_are_those_of_flatten(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    q, k = q * 1e-2, k * 1e-2  # where eps can be seen
    assert_equations(focused_la(q, k, v, impl=impl), by_hand(q, k, v, None, 3, 1e-6))


@each_impl
def test_heads_of_a_token_are_normalised_together(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    expected = focused_la(q, k, v, eps=0.1, impl=impl)
    q[:, 2] *= 10
    o = focused_la(q, k, v, eps=0.1, impl=impl)
    assert not torch.allclose(o[:, 0], expected[:, 0])


@each_impl
@pytest.mark.parametrize("focusing_factor", [2, 3])
def test_gradcheck(focusing_factor, impl):
    q, k, v, _ = make_qkv((1, 2, 3, 4, 3, 2), torch.float64, away_from_zero=True)
    leaves = [x.requires_grad_() for x in (q, k, v, make_scale(2, 3))]

    def focused(q, k, v, scale, impl):
        return focused_la(q, k, v, focusing_factor=focusing_factor, scale=scale, impl=impl)

    assert_derivatives(focused, leaves, impl)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 100.0])
def test_every_dtype_is_accurate(magnitude, dtype, impl):
    q, k, v, do = make_qkv((1, 3, 40, 50, 16, 8), dtype)
    q, k = q * magnitude, k * magnitude
    scale = make_scale(3, 16, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, scale)]
    o = focused_la(q, k, v, scale=scale, impl=impl)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = focused_la(*wide[:3], scale=wide[3], impl="reference")
    assert o.dtype == dtype
    assert_on_rail(o.detach(), truth.detach(), factor=4)
    gradients = torch.autograd.grad(o, leaves, do)
    assert [x.dtype for x in gradients] == [dtype, dtype, dtype, torch.float32]
    assert all(x.isfinite().all() for x in gradients)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("focusing_factor", [3, 8, 32])
def test_no_power_overflows_or_vanishes(focusing_factor, dtype, impl):
    q, k, v, do = make_qkv(SHAPE, dtype)
    q[:, :, 0], q[:, :, 1], k[:, :, 0] = -1.0, 3e4, 3e4
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = focused_la(*leaves, focusing_factor=focusing_factor, impl=impl)
    assert o.isfinite().all()
    # A mean of values, weighed without signs.
    assert (o.abs() <= 1.01 * v.abs().amax(2, keepdim=True)).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o, leaves, do))


@each_impl
def test_a_mask_is_truncation(impl):
    q, k, v, do = make_qkv(SHAPE, torch.float64)
    mask = torch.arange(7, device=DEVICE).expand(2, 7) < 4
    scale = make_scale().requires_grad_()
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("inf")
    masked = [x.requires_grad_() for x in (q, k, v)]
    o = focused_la(*masked, scale=scale, key_mask=mask, impl=impl)
    dq, dk, dv, dscale = torch.autograd.grad(o, [*masked, scale], do)
    short = [x.detach().requires_grad_() for x in (q, k[:, :, :4], v[:, :, :4])]
    expected = focused_la(*short, scale=scale, impl=impl)
    assert_equations(o, expected)
    gradients = torch.autograd.grad(expected, [*short, scale], do)
    for x, y in zip((dq, dk[:, :, :4], dv[:, :, :4], dscale), gradients, strict=True):
        assert_equations(x, y)
    assert not dk[:, :, 4:].any() and not dv[:, :, 4:].any()


@each_impl
@pytest.mark.parametrize("empty", ["B", "H", "N", "M", "V"])
def test_empty(empty, impl):
    sizes = zip("BHNMKV", SHAPE, strict=True)
    q, k, v, do = make_qkv([0 if name == empty else n for name, n in sizes], torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = focused_la(*leaves, impl=impl)
    assert o.shape == do.shape and not o.any()
    for gradient, x in zip(torch.autograd.grad(o, leaves, do), leaves, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@each_impl
def test_layouts(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float64)
    expected = focused_la(q, k, v, impl=impl)
    assert expected.is_contiguous()
    for layout in ("token_major", "packed_qkv"):
        o = focused_la(*(LAYOUTS[layout](x) for x in (q, k, v)), impl=impl)
        assert o.transpose(1, 2).is_contiguous()
        assert_equations(o, expected)


@each_impl
def test_autocast(impl):
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    scale, low = make_scale(dtype=torch.float32), DTYPES[-1]
    with torch.autocast(DEVICE, dtype=low):
        o = focused_la(q, k, v, scale=scale, impl=impl)
    expected = focused_la(*(x.to(low) for x in (q, k, v)), scale=scale, impl=impl)
    assert o.dtype == low and torch.equal(o, expected)


@each_impl
def test_as_in_the_code_of_flatten(impl):
    """Tokens `(B, N, C)`, as the layer has them before it splits the heads."""
    x = make_qkv((2, 1, 7, 7, 12, 12), torch.float64)
    q, k, v = (y[:, 0] for y in x[:3])
    parameter = make_scale().view(1, 1, 12)
    q, k = (torch.relu(y) + 1e-6 for y in (q, k))
    q, k = (y / F.softplus(parameter) for y in (q, k))
    q, k = (y**3 / (y**3).norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True) for y in (q, k))
    q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    expected = q @ ((k.transpose(-2, -1) * 7**-0.5) @ (v * 7**-0.5)) * z
    inputs = (y[:, 0].unflatten(-1, (3, 4)).transpose(1, 2) for y in x[:3])
    assert_equations(focused_la(*inputs, scale=parameter.view(3, 4), impl=impl), expected)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads_of_unlike_size(head_dim, dtype, impl):
    """Each head's output is of its values' size, though its f is far smaller than another's."""
    q, k, v, do = make_qkv((1, 2, 20, 24, head_dim, head_dim), dtype)
    q[:, 1] /= 300
    k[:, 0] /= 300
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    truth = focused_la(*wide, impl="reference", eps=1e-15)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = focused_la(*leaves, impl=impl, eps=1e-15)
    assert_on_rail(o.detach(), truth.detach())
    gradients = torch.autograd.grad(o, leaves, do)
    assert all(x.isfinite().all() for x in gradients)
    (dv,) = torch.autograd.grad(truth, wide[2:], do.double())
    assert_on_rail(gradients[2], dv, factor=2)

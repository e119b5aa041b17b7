"""(1 + eps + s) a - s mean(v) and its gradients by kernels, against float64."""

import itertools

import pytest
import torch
from helpers import DEVICE, DTYPES, LAYOUTS, LOW, passes_made

from fbila.ops import magnitude as library
from fbila.ops.kernels import magnitude as kernels
from fbila.ops.magnitude import _WithMagnitude, by_pytorch, with_magnitude

KINDS = [*DTYPES, torch.float64]
# B, H, N, M, d.
SHAPES = [(2, 3, 49, 49, 64), (1, 1, 1, 1, 1), (2, 1, 300, 300, 32), (1, 5, 70, 11, 20),
          (3, 2, 33, 40, 96), (2, 2, 5, 1, 257), (1, 1, 3, 7, 2048), (1, 2, 513, 6, 4)]  # fmt: skip
ORDERS = {"head_major": (0, 1, 2, 3), "token_major": (0, 2, 1, 3), "channels_first": (0, 1, 3, 2)}
# Large enough to be seen where it is missing.
EPS = 0.25


def formula(a, s, v, eps=EPS):
    return (1 + eps + s) * a - s * v.mean(2, keepdim=True)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def ordered(x, order):
    """x with its axes in that order in memory; an order undoes itself."""
    return x.permute(ORDERS[order]).contiguous().permute(ORDERS[order])


def problem(shape=(2, 3, 24, 24, 8), dtype=torch.float32, wanted=(True,) * 3, order="token_major"):
    B, H, N, M, d = shape
    shapes = (B, H, N, d), (B, H, N, 1), (B, H, M, d)
    tensors = [ordered(draw(*s, dtype=dtype, seed=i), order) for i, s in enumerate(shapes)]
    leaves = [t.requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    return leaves, ordered(draw(*shapes[0], dtype=dtype, seed=3), order)


def near(actual, expected, size):
    """size: of what is summed, to which roundings are relative."""
    limits = torch.finfo(actual.dtype)
    eps = (1 if actual.dtype.itemsize == 2 else 16) * limits.eps
    assert actual.shape == expected.shape
    # And the step of subnormal numbers.
    bound = eps * size + limits.smallest_normal * limits.eps
    assert ((actual.double() - expected).abs() <= bound).all()


def check(leaves, dy, run=_WithMagnitude.apply):
    """y and all gradients that are wanted, which are returned."""
    a, s, v = (t.detach().double() for t in leaves)
    wide, mean, M = dy.double(), v.mean(2, keepdim=True), v.shape[2]
    y = run(*leaves, EPS)
    assert y.dtype == leaves[0].dtype
    size = (1 + EPS + s.abs()) * a.abs() + s.abs() * v.abs().mean(2, keepdim=True)
    near(y, formula(a, s, v), size)
    exact = [
        ((1 + EPS + s) * wide, (1 + EPS + s.abs()) * wide.abs()),
        ((wide * (a - mean)).sum(3, True),
         (wide.abs() * (a.abs() + v.abs().mean(2, True))).sum(3, True)),
        ((-s * wide).sum(2, True).expand_as(v) / M, (s * wide).abs().sum(2, True).expand_as(v) / M),
    ]  # fmt: skip
    wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
    found = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for i, gradient in zip(wanted, found, strict=True):
        assert gradient.dtype == leaves[i].dtype
        near(gradient, *exact[i])
    return found


@pytest.fixture
def launched(monkeypatch):
    """The names of the passes that kernels have made."""
    return passes_made(monkeypatch, library)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients(shape, dtype, order):
    leaves, dy = problem(shape, dtype, order=order)
    check(leaves, dy)
    assert _WithMagnitude.apply(*leaves, EPS).stride() == formula(*leaves).stride()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False),
                                    (False, False, True), (True, True, False),
                                    (True, False, True), (False, True, True)], ids=str)  # fmt: skip
def test_some_gradients(wanted, dtype, monkeypatch):
    leaves, dy = problem(dtype=dtype, wanted=wanted)
    run, made = library.backward_in_kernel, []
    monkeypatch.setattr(library, "backward_in_kernel", lambda *t: made.extend(run(*t)) or made)
    check(leaves, dy)
    # No others are computed.
    assert len(made) == sum(wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _WithMagnitude.apply(*leaves, EPS)
    a, s, v = wanted
    given = [t.data_ptr() for t, read in zip(leaves, (s, a or v, s and v), strict=True) if read]
    places = [t.data_ptr() for t in kept]
    assert set(given) <= set(places) and len(places) == len(given) + s


def test_what_no_gradient_reads_may_be_changed():
    leaves, dy = problem(wanted=(True, False, True))
    expected = check(leaves, dy)
    inputs = [t * 1 for t in leaves]
    y = _WithMagnitude.apply(*inputs, EPS)
    inputs[0].add_(1)
    inputs[2].add_(1)
    y.mul_(2)
    found = torch.autograd.grad(y, [leaves[0], leaves[2]], dy / 2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", ORDERS)
def test_a_program_goes_over_many_tiles(monkeypatch, order):
    for name, value in (("ELEMENTS", 256), ("RUN", 2)):
        monkeypatch.setattr(kernels, name, value)
    for name in ("plan_magnitude", "plan_magnitude_backward"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name).__wrapped__)
    for N in (300, 64, 65, 8, 1):
        check(*problem((2, 3, N, N, 24), order=order))


def test_all_multiprocessors_have_work():
    """Of the first two stages of MAViT-T, at 224 x 224 and a batch of 64."""
    dtypes = (torch.bfloat16,) * 3 + (torch.float32,) + (torch.bfloat16,) * 2
    for shape, order in itertools.product(((64, 1, 3136, 64), (64, 2, 784, 64)), ORDERS):
        launch, *_ = kernels.plan_magnitude_backward(shape, order, dtypes, 1e-6, shape[2])
        assert launch.grid[0] >= 3 * 132


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    leaves, dy = problem((2, 3, 16, 16, 8))
    expected = [t.clone() for t in check(leaves, dy)]
    views = [LAYOUTS[layout](t.detach()) for t in (*leaves, dy)]
    for which in range(4):
        mixed = [views[i] if i == which else t.detach() for i, t in enumerate((*leaves, dy))]
        for given in (mixed, views):
            found = check([t.requires_grad_() for t in given[:3]], given[3].detach())
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


def test_expanded_gradients():
    leaves, dy = problem()
    for given in (dy[..., :1].expand_as(dy), dy[:, :, :1].expand_as(dy), dy[:, :1].expand_as(dy)):
        check(leaves, given)
    check(leaves, torch.ones_like(dy[:1, :1, :1, :1]).expand_as(dy))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_same_bits_every_time_and_in_any_batch(dtype, order):
    leaves, dy = problem((4, 3, 700, 700, 24), dtype, order=order)
    y, expected = _WithMagnitude.apply(*leaves, EPS), check(leaves, dy)
    for _ in range(3):
        found = torch.autograd.grad(_WithMagnitude.apply(*leaves, EPS), leaves, dy)
        assert all(map(torch.equal, found, expected))
    # Of one mean: its bits are PyTorch's.
    _, s, mean, _ = y.grad_fn.saved_tensors
    a = leaves[0].detach()
    options = EPS, 700, True, True
    whole = library.backward_in_kernel(dy, a, s, mean, *options)
    alone = library.backward_in_kernel(*(t[1:2, :2] for t in (dy, a, s, mean)), *options)
    for one, other in zip(alone, whole, strict=True):
        assert torch.equal(one, other[1:2, :2])
    one = library.in_kernel(a[1:2, :2], s[1:2, :2].detach(), mean[1:2, :2], EPS)
    assert torch.equal(one, y[1:2, :2])


def test_gradients_of_gradients():
    leaves, _ = problem((2, 2, 4, 3, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: _WithMagnitude.apply(*t, EPS), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: _WithMagnitude.apply(*t, EPS), leaves)
    for frozen in range(3):
        some = [t.detach() if i == frozen else t for i, t in enumerate(leaves)]
        assert torch.autograd.gradgradcheck(lambda *t: _WithMagnitude.apply(*t, EPS), some)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_gradients_by_pytorch_are_the_same(monkeypatch, dtype):
    monkeypatch.setattr(library, "backward_in_kernel", by_pytorch)
    check(*problem(dtype=dtype))


def test_many_gradients_at_once():
    leaves, dy = problem()
    y = _WithMagnitude.apply(*leaves, EPS)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    both = torch.autograd.grad(y, leaves, torch.stack((dy, 2 * dy)), is_grads_batched=True)
    for found, one in zip(both, expected, strict=True):
        torch.testing.assert_close(found, torch.stack((one, 2 * one)))


def test_it_is_kernels_with_and_without_gradients(launched):
    leaves, dy = problem()
    with torch.inference_mode():
        torch.testing.assert_close(with_magnitude(*leaves, EPS), formula(*leaves))
    assert launched == ["in_kernel"]
    launched.clear()
    check(leaves, dy, with_magnitude)
    assert launched == ["in_kernel", "backward_in_kernel"]


def test_gradients_of_a_leaf_have_memory_of_their_own():
    leaves, dy = problem()
    _WithMagnitude.apply(*leaves, EPS).backward(dy)
    assert leaves[2].grad.stride() == leaves[2].stride()


def test_what_kernels_do_not_take_is_pytorchs(launched):
    leaves, _ = problem((2, 3, 4, 4, 4))
    a, s, v = leaves
    wide = torch.zeros(1, 1, 1, 2049)
    for arguments in (
        (a[:, :, :0], s[:, :, :0], v),
        (a[:0], s[:0], v[:0]),
        (a, s, v[:, :, :0]),
        (a, s, v[:, :1]),
        (a, s[:1], v),
        (a[:1], s, v),
        (a, s, v[..., :1]),
        (a, a, v),
        (a[0], s[0], v),
        (a[0, 0], s[0, 0], v),
        (a, s.half(), v),
        (a.half(), s.half(), v),
        (a.to(torch.complex64), s.to(torch.complex64), v.to(torch.complex64)),
        (wide, wide[..., :1], wide),
    ):
        found, expected = with_magnitude(*arguments, EPS), formula(*arguments)
        torch.testing.assert_close(found, expected, equal_nan=True, check_stride=True)
    for transform in (torch.func.grad, torch.func.jacfwd):
        found, expected = (
            transform(lambda a, f=f: f(a, s, v, EPS).square().sum())(a)
            for f in (with_magnitude, formula)
        )
        torch.testing.assert_close(found, expected)
    assert with_magnitude(*(t.detach().to("meta") for t in leaves), EPS).shape == a.shape
    assert launched == []


def test_compiled_graphs_have_the_formula(launched):
    leaves, dy = problem()
    y = torch.compile(with_magnitude, backend="aot_eager", fullgraph=True)(*leaves, EPS)
    found = torch.autograd.grad(y, leaves, dy)
    assert launched == []
    for one, other in zip(found, check(leaves, dy), strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_traced():
    class Sum(torch.nn.Module):
        def forward(self, a, s, v):
            return with_magnitude(a.view(a.shape), s, v, EPS)

    leaves, _ = problem(order="head_major")
    assert torch.equal(torch.fx.symbolic_trace(Sum())(*leaves), formula(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64], ids=str)
def test_it_is_served_on_a_gpu_also_under_autocast(dtype):
    leaves, dy = problem((64, 2, 49, 49, 64), dtype)
    assert "_WithMagnitude" in type(with_magnitude(*leaves, EPS).grad_fn).__name__
    with torch.autocast("cuda", torch.bfloat16):
        y = with_magnitude(*leaves, EPS)
        assert "_WithMagnitude" in type(y.grad_fn).__name__
        assert y.dtype == formula(*leaves).dtype
        check(leaves, dy, with_magnitude)
    with pytest.raises(RuntimeError, match="device"):
        with_magnitude(*leaves[:2], leaves[2].cpu(), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_more_than_2_31_elements(order):
    B, N, d = 3, 2**24, 64
    sizes = [(B, 1, N, d)[axis] for axis in ORDERS[order]]
    a = torch.zeros(sizes, dtype=torch.float16, device=DEVICE).permute(ORDERS[order])
    s = torch.zeros(B, 1, N, 1, dtype=torch.float16, device=DEVICE)
    a[-1, 0, -1], s[-1, 0, -1] = 3, 2
    v = torch.ones(B, 1, 1, d, dtype=torch.float16, device=DEVICE)
    leaves = [t.requires_grad_() for t in (a, s, v)]
    y = _WithMagnitude.apply(*leaves, 0.0)
    assert (y[-1, 0, -1] == 7).all() and not y[-1, 0, :-1].any() and not y[:-1].any()
    da, ds, dv = torch.autograd.grad(y, leaves, y.detach())
    assert (da[-1, 0, -1] == 21).all() and not da[:-1].any()
    assert ds[-1, 0, -1] == 7 * 2 * d and not ds[:-1].any()
    assert (dv[-1] == -14).all() and not dv[:-1].any()

"""x + s y and its gradients by kernels, against float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES, LOW, passes_made

from fbila.ops import layer_scale as library
from fbila.ops.kernels import layer_scale as kernels
from fbila.ops.layer_scale import _AddScaled, add_scaled, by_pytorch

KINDS = [*DTYPES, torch.float64]
SHAPES = [(1, 8), (7, 64), (2, 3, 5, 100), (7, 320), (1, 513), (3136, 64), (49, 64, 8)]
# Of x, scale and y, the first as under autocast.
MIXED = [
    *((torch.float32, torch.float32, low) for low in LOW),
    *((low, torch.float32, low) for low in LOW),
    *((low, low, torch.float32) for low in LOW),
    (torch.float32, torch.float64, torch.float16),
]
ALL = (True, True, True)


def draw(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def near(actual, expected, size):
    """size: of what is summed, to which roundings are relative."""
    limits = torch.finfo(actual.dtype)
    eps = (1 if actual.dtype.itemsize == 2 else 16) * limits.eps
    assert actual.shape == expected.shape
    # And the step of subnormal numbers.
    bound = eps * size + limits.smallest_normal * limits.eps
    assert ((actual.double() - expected).abs() <= bound).all()


def problem(shape=(2, 3, 24), dtypes=(torch.float32,) * 3, wanted=ALL):
    kinds = zip((shape, shape[-1:], shape), dtypes, wanted, strict=True)
    leaves = [
        draw(*s, dtype=d, seed=i).requires_grad_(want) for i, (s, d, want) in enumerate(kinds)
    ]
    return leaves, draw(*shape, dtype=torch.addcmul(*leaves).dtype, seed=3)


def check(leaves, dz, run=_AddScaled.apply):
    """z and all gradients that are wanted, which are returned."""
    x, scale, y = (t.detach().double() for t in leaves)
    z = run(*leaves)
    assert z.dtype == torch.addcmul(*leaves).dtype
    near(z, x + scale * y, x.abs() + (scale * y).abs())
    products = (dz.double() * y).reshape(-1, y.shape[-1])
    exact = (dz.double(), products.sum(0), dz.double() * scale)
    sizes = (dz.double().abs(), products.abs().sum(0), exact[2].abs())
    wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
    found = torch.autograd.grad(z, [leaves[i] for i in wanted], dz)
    for i, gradient in zip(wanted, found, strict=True):
        assert gradient.dtype == leaves[i].dtype
        near(gradient, exact[i], sizes[i])
    return found


@pytest.fixture
def launched(monkeypatch):
    """The names of the passes that kernels have made."""
    return passes_made(monkeypatch, library)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_gradients(shape, dtype):
    check(*problem(shape, (dtype,) * 3))


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_mixed_dtypes(dtypes):
    check(*problem((5, 7, 40), dtypes))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False),
                                    (False, False, True), (True, False, True),
                                    (True, True, False)], ids=str)  # fmt: skip
def test_some_gradients(wanted, dtype):
    leaves, dz = problem(dtypes=(dtype,) * 3, wanted=wanted)
    check(leaves, dz)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _AddScaled.apply(*leaves)
    read = [t for t, reads in zip(leaves[1:], (wanted[2], wanted[1]), strict=True) if reads]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in read]


def test_what_no_gradient_reads_may_be_changed():
    leaves, dz = problem(wanted=(True, False, True))
    expected = check(leaves, dz)
    inputs = [t * 1 for t in leaves]
    z = _AddScaled.apply(*inputs)
    inputs[0].add_(1)
    inputs[2].add_(1)
    z.mul_(2)
    found = torch.autograd.grad(z, [leaves[0], leaves[2]], dz / 2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_program_goes_over_many_tiles(monkeypatch):
    for name, value in (("PROGRAMS", 4), ("COLUMNS", 32), ("ELEMENTS", 256)):
        monkeypatch.setattr(kernels, name, value)
    plans = (kernels.plan_add_scaled, kernels.plan_add_scaled_backward)
    for plan in plans:
        plan.cache_clear()
    for shape in ((300, 72), (301, 13), (8, 64), (9, 64)):
        check(*problem(shape))
    for plan in plans:
        plan.cache_clear()


def test_all_multiprocessors_have_work():
    """Of every stage of RAVLT-T, at 224 x 224 and a batch of 64; a wave, and no more."""
    for rows, columns in ((200704, 64), (50176, 128), (12544, 256), (3136, 512)):
        dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
        launch, *_ = kernels.plan_add_scaled_backward(rows, columns, dtypes, torch.float32)
        assert 3 * 132 <= launch.grid[0] <= 4 * 132


def test_views():
    leaves, dz = problem()
    views = [
        torch.cat((leaves[0], leaves[0]), -1).detach()[..., 24:],
        leaves[1].detach().repeat_interleave(2)[::2],
        leaves[2].detach().transpose(0, 2).contiguous().transpose(0, 2),
    ]
    views = [t.requires_grad_() for t in views]
    for given in (dz, dz[..., :1].expand_as(dz), dz.mT.contiguous().mT):
        for inputs in (leaves, views, [*views[:2], leaves[2]]):
            check(inputs, given)


def test_of_one_vector():
    check(*problem((40,)))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, *MIXED], ids=str)
def test_the_same_bits_every_time(dtypes):
    leaves, dz = problem((16, 49, 72), dtypes)
    expected = check(leaves, dz)
    for _ in range(3):
        found = torch.autograd.grad(_AddScaled.apply(*leaves), leaves, dz)
        assert all(map(torch.equal, found, expected))


def test_gradients_of_gradients():
    leaves, _ = problem((2, 3, 4), (torch.float64,) * 3)
    assert torch.autograd.gradcheck(_AddScaled.apply, leaves)
    assert torch.autograd.gradgradcheck(_AddScaled.apply, leaves)
    for frozen in range(3):
        some = [t.detach() if i == frozen else t for i, t in enumerate(leaves)]
        assert torch.autograd.gradgradcheck(_AddScaled.apply, some)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, MIXED[0]], ids=str)
def test_gradients_by_pytorch_are_the_same(monkeypatch, dtypes):
    monkeypatch.setattr(library, "backward_in_kernel", by_pytorch)
    check(*problem(dtypes=dtypes))


def test_many_gradients_at_once():
    leaves, dz = problem()
    z = _AddScaled.apply(*leaves)
    expected = torch.autograd.grad(z, leaves, dz, retain_graph=True)
    both = torch.autograd.grad(z, leaves, torch.stack((dz, 2 * dz)), is_grads_batched=True)
    for found, one in zip(both, expected, strict=True):
        torch.testing.assert_close(found, torch.stack((one, 2 * one)))


def test_no_kernel_without_gradients(launched):
    leaves, dz = problem()
    with torch.no_grad():
        assert torch.equal(add_scaled(*leaves), torch.addcmul(*leaves))
    constants = [t.detach() for t in leaves]
    assert torch.equal(add_scaled(*constants), torch.addcmul(*constants))
    assert launched == []
    check(leaves, dz, add_scaled)
    assert launched == ["in_kernel", "backward_in_kernel"]
    # There, x's gradient is that of the result.
    launched.clear()
    leaves, dz = problem(wanted=(True, False, False))
    check(leaves, dz, add_scaled)
    assert launched == ["in_kernel"]


def test_what_kernels_do_not_take_is_pytorchs(launched):
    leaves, _ = problem((4, 4))
    x, scale, y = leaves
    for arguments in (
        (x[:0], scale, y[:0]),
        (x, scale, y[:1]),
        (x[:1], scale, y),
        (x, scale[:1], y),
        (x, x[:, :1], y),
        (x, x, y),
        (x, scale[0], y),
        (x[0, 0], scale[0], y[0, 0]),
        (x, scale, y.detach().int()),
        (x.to(torch.complex64), scale, y),
    ):
        torch.testing.assert_close(add_scaled(*arguments), torch.addcmul(*arguments))
    for transform in (torch.func.grad, torch.func.jacfwd):
        found, expected = (
            transform(lambda x, f=f: f(x, scale, y).square().sum())(x)
            for f in (add_scaled, torch.addcmul)
        )
        torch.testing.assert_close(found, expected)
    assert launched == []


def test_compiled_graphs_have_the_formula(launched):
    leaves, dz = problem()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    z = torch.compile(add_scaled, backend=backend, fullgraph=True)(*leaves)
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [torch.addcmul]
    for found, expected in zip(torch.autograd.grad(z, leaves, dz), check(leaves, dz), strict=True):
        torch.testing.assert_close(found, expected)


def test_it_is_traced():
    class Sum(torch.nn.Module):
        def forward(self, x, scale, y):
            return add_scaled(x, scale.view(-1), y)

    leaves, _ = problem()
    assert torch.equal(torch.fx.symbolic_trace(Sum())(*leaves), torch.addcmul(*leaves))


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_it_is_served_on_a_gpu_also_under_autocast(low):
    for dtypes in ((torch.float32, torch.float32, low), (low, torch.float32, low), (low,) * 3):
        leaves, dz = problem((64, 49, 64), dtypes)
        assert "_AddScaled" in type(add_scaled(*leaves).grad_fn).__name__
        with torch.autocast("cuda", low):
            z = add_scaled(*leaves)
            assert "_AddScaled" in type(z.grad_fn).__name__
            assert z.dtype == torch.addcmul(*leaves).dtype
            check(leaves, dz, add_scaled)
    with pytest.raises(RuntimeError, match="device"):
        add_scaled(leaves[0], leaves[1].cpu(), leaves[2])
    leaves, _ = problem(dtypes=(torch.float64,) * 3)
    with torch.autocast("cuda", low):
        assert "_AddScaled" not in type(add_scaled(*leaves).grad_fn).__name__


@pytest.mark.gpu
def test_more_than_2_31_elements():
    R, C = 2**25 + 3, 64
    x = torch.zeros(R, C, dtype=torch.float16, device=DEVICE)
    y = torch.zeros_like(x)
    y[-1], x[-1] = 3, 1
    scale = torch.full((C,), 2.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    z = _AddScaled.apply(x, scale, y.requires_grad_())
    assert (z[-1] == 7).all() and not z[:-1].any()
    dscale, dy = torch.autograd.grad(z, (scale, y), z.detach())
    assert (dscale == 21).all() and (dy[-1] == 14).all() and not dy[:-1].any()

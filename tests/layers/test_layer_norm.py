"""fbila's LayerNorm is PyTorch's, with or without its kernels."""

import copy

import pytest
import torch
from helpers import CUDA, DEVICE, DTYPES
from torch import nn

from fbila.layers import layer_norm
from fbila.layers.layer_norm import LayerNorm
from fbila.ops import norm_library


@pytest.fixture(params=[False, True], ids=["", "kernel"])
def seen(request, monkeypatch):
    """Widths that went to the op; where there is no GPU, none, or to interpreted kernels."""
    widths: list[int] = []
    original = layer_norm.layer_norm_directly

    def watched(x, *others):
        widths.append(x.shape[-1])
        return original(x, *others)

    monkeypatch.setattr(layer_norm, "layer_norm_directly", watched)
    if request.param and CUDA:
        pytest.skip("kernels are not interpreted where there is a GPU")
    if request.param:
        for module in (layer_norm, norm_library):
            monkeypatch.setattr(module, "direct", lambda *_: True)
    yield widths
    assert bool(widths) == (CUDA or request.param)


def make(width=96, dtype=torch.float32, **options):
    torch.manual_seed(0)
    norm = LayerNorm(width, eps=1e-3, **options).to(DEVICE, dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


kernel_alone = pytest.mark.parametrize("seen", [not CUDA], indirect=True)
OPTIONS = [{}, {"bias": False}, {"elementwise_affine": False}]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_inference(options, dtype, seen):
    ours = make(**options, dtype=dtype)
    x = 3 + torch.randn(2, 5, 96, device=DEVICE).to(dtype)
    y = ours(x)
    expected = nn.LayerNorm.forward(ours.double(), x.double())
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_gradients(options, dtype, strided, seen):
    ours = make(37, dtype, **options)
    wide = 3 + torch.randn(2, 300, 40, device=DEVICE).to(dtype)
    x = (wide[..., 2:39] if strided else wide[..., :37].contiguous()).requires_grad_()
    dy = torch.randn(2, 300, 37, device=DEVICE).to(dtype)
    actual = torch.autograd.grad(ours(x), (x, *ours.parameters()), dy)
    assert all(t.dtype == dtype for t in actual)
    assert_gradients(actual, ours, x, dy, 1 if seen else 4)


def assert_gradients(actual, ours, x, dy, slack):
    x = x.detach().double().requires_grad_()
    ours = ours.double()
    y = nn.LayerNorm.forward(ours, x)
    exact = torch.autograd.grad(y, (x, *ours.parameters()), dy.double())
    for got, wide in zip(actual, exact, strict=True):
        eps = torch.finfo(got.dtype).eps * (2 if got.dtype.itemsize == 2 else 16)
        bound = slack * eps * (wide.abs().max() + (25 if wide.ndim == 1 else 1))
        assert (got.double() - wide).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("for_maps", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_under_autocast(options, for_maps, dtype, seen):
    ours = make(37, for_maps=for_maps, **options)
    x = (3 + torch.randn(300, 37, device=DEVICE).to(dtype)).requires_grad_()
    kept = []
    with (
        torch.autocast(DEVICE, torch.float16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = ours(x)
    # That of a CPU answers in half precision as well.
    assert y.dtype == (torch.float16 if for_maps else torch.float32 if seen else dtype)
    if not seen:
        return
    # x itself, not a copy in float32.
    assert [t.data_ptr() for t in kept if t.ndim > 1] == [x.data_ptr()]
    eps = torch.finfo(y.dtype).eps
    exact = copy.deepcopy(ours).double()
    expected = nn.LayerNorm.forward(exact, x.detach().double())
    # As if PyTorch's result were cast, for maps: half of an eps and little more.
    bounds = {"rtol": 0.51 * eps, "atol": 1e-5} if for_maps else {"rtol": eps, "atol": 16 * eps}
    torch.testing.assert_close(y.double(), expected, **bounds)
    dy = torch.randn(300, 37, device=DEVICE).to(y.dtype)
    actual = torch.autograd.grad(y, (x, *ours.parameters()), dy)
    assert [t.dtype for t in actual] == [dtype, *(p.dtype for p in ours.parameters())]
    assert_gradients(actual, ours, x, dy, 1)


@kernel_alone
def test_weights_of_low_precision_under_autocast(seen):
    ours = make(dtype=torch.float16)
    x = 3 + torch.randn(7, 96, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16), torch.no_grad():
        y = ours(x)
    assert y.dtype == torch.float32
    expected = nn.LayerNorm.forward(ours.double(), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5)


def test_float64_is_left_alone_under_autocast():
    ours, x = make(dtype=torch.float64, for_maps=True), torch.randn(7, 96, device=DEVICE).double()
    with torch.autocast(DEVICE, torch.float16):
        assert ours(x).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_where_the_kernel_is_not(monkeypatch):
    x = torch.randn(4, 8, device="cuda")
    monkeypatch.setattr(layer_norm, "layer_norm", lambda *_: pytest.fail("the kernel was called"))
    ours = LayerNorm(8).cuda()
    LayerNorm((4, 8)).cuda()(x)
    LayerNorm(layer_norm.MOST + 1).cuda()(torch.randn(2, layer_norm.MOST + 1, device="cuda"))
    torch.func.vmap(ours)(x[None])
    torch.func.grad(lambda x: ours(x).sum())(x)
    torch.compile(ours, fullgraph=True, backend="eager")(x)
    with pytest.raises(RuntimeError):
        ours(x[:, :4])


def test_training(seen):
    ours, x = make(8, torch.float64), torch.randn(4, 8, device=DEVICE).double()
    torch.autograd.gradcheck(ours, x.requires_grad_())
    ours(x).sum().backward()
    assert ours.weight.grad is not None and ours.bias.grad is not None


@kernel_alone
def test_gradients_of_gradients_are_refused(seen):
    ours, x = make(8), torch.randn(4, 8, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm cannot be differentiated twice"):
        dx.sum().backward()


def test_on_meta():
    x = torch.randn(4, 8, device="meta")
    assert LayerNorm(8, for_maps=True, device="meta")(x).shape == (4, 8)


@pytest.mark.parametrize("for_maps", [False, True])
def test_compiles(for_maps):
    torch._dynamo.reset()
    ours, x = make(for_maps=for_maps), torch.randn(4, 96, device=DEVICE, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), ours(x))
    with torch.autocast(DEVICE, torch.float16):
        y, expected = compiled(x), ours(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)

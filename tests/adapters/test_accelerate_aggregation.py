"""Scales of multi-scale linear attention by one kernel, and by the model's own convolutions."""

import pytest
import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from helpers import CUDA, DEVICE, LOW
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fbila
from fbila.adapters.acceleration import aggregation, one_picture
from fbila.ops import separable_conv_library
from fbila.ops.autograd import ordinary

ORDERS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def kernels(monkeypatch):
    """Has the kernel run, through Triton's interpreter where there is no GPU.

    Notes what each call reads, whether it makes its result or writes into a picture of all scales.
    """
    called = []

    def run(x, *weights):
        called.append(x)
        return separable_conv_library.separable_conv2d(x, *weights)

    def run_into(y, x, *weights):
        called.append(x)
        separable_conv_library.separable_conv2d_into(y, x, *weights)

    monkeypatch.setattr(aggregation, "separable_conv2d", run)
    monkeypatch.setattr(one_picture, "separable_conv2d_into", run_into)
    if not CUDA:
        monkeypatch.setattr(aggregation, "has_kernels", lambda x: True)
        monkeypatch.setattr(one_picture, "direct", ordinary)
        monkeypatch.setattr(separable_conv_library, "direct", lambda *tensors: True)
    return called


def lite_mla(**settings):
    return LiteMLA(32, 32, dim=16, **{"scales": (3, 5), **settings})


def dc_ae(**settings):
    return SanaMultiscaleLinearAttention(
        32, 32, **{"attention_head_dim": 16, "kernel_sizes": (3, 5), **settings}
    )


MODULES = {"EfficientViT": lite_mla, "DC-AE": dc_ae}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def made(make, dtype=torch.float32, **settings):
    """A model of one attention module."""
    torch.manual_seed(0)
    return nn.ModuleList([make(**settings)]).eval().to(DEVICE, dtype)


def scales_of(model):
    module = model[0]
    return module.aggreg if isinstance(module, LiteMLA) else module.to_qkv_multiscale


def picture(dtype=torch.float32, order=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 32, 6, 10, generator=generator)
    return x.to(DEVICE, dtype).contiguous(memory_format=order)


def assert_stock_runs(model, x, kernels, scales=0):
    """Each of the convolutions of all scales but `scales`, and no more kernels than that."""
    stock = model[0](x)
    with fbila.accelerate(model):
        fast = model[0](x)
    assert len(kernels) == scales
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


@each_module
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@torch.no_grad()
def test_the_kernel_computes_what_stock_does(make, order, kernels):
    model, x = made(make), picture(order=order)
    model.to(memory_format=order)
    stock = model[0](x)
    with fbila.accelerate(model):
        fast = model[0](x)
    # One for each scale, on what makes the first one.
    assert len(kernels) == 2 and kernels[0] is kernels[1]
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_biases(kernels):
    model, x = made(lite_mla, use_bias=True), picture()
    stock = model[0](x)
    fbila.accelerate(model)
    torch.testing.assert_close(model[0](x), stock, rtol=1e-5, atol=1e-5)
    assert len(kernels) == 2


@each_module
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_half_precision_errs_as_stock_does(make, dtype, order, kernels):
    model, x = made(make, dtype), picture(dtype, order)
    exact = made(make).double()
    exact.load_state_dict(model.state_dict())
    truth, stock = exact[0](x.double()), model[0](x)
    with fbila.accelerate(model):
        fast = model[0](x)
    assert len(kernels) == 2 and kernels[0] is kernels[1] and fast.dtype == dtype
    # LiteMLA's scales lie side by side in one picture, if x is NCHW.
    together = kernels[0].stride(0) > kernels[0][0].numel()
    assert together is (make is lite_mla and order is torch.contiguous_format)
    assert (fast.double() - truth).norm() <= 1.05 * (stock.double() - truth).norm()


@each_module
def test_gradients_go_through_stock(make, kernels):
    model = made(make)
    assert_stock_runs(model, picture(), kernels)
    model.requires_grad_(False)
    assert_stock_runs(model, picture().requires_grad_(), kernels)
    # Nothing wants one.
    assert_stock_runs(model, picture(), kernels, 2)


@each_module
@pytest.mark.parametrize("place", [0, 1, None])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_are_called(make, place, hook, kernels):
    model = made(make)
    scale = scales_of(model)[0]
    module = scale if place is None else list(scale.children())[place]
    called = []
    getattr(module, hook)(lambda *args: called.append(args))
    assert_stock_runs(model, picture(), kernels, 1)
    assert len(called) == 2


OTHERS = {
    "dilated": lambda: nn.Conv2d(96, 96, 5, padding="same", groups=96, dilation=2),
    "strided": lambda: nn.Conv2d(96, 96, 5, padding=2, groups=96, stride=2),
    "reflecting": lambda: nn.Conv2d(96, 96, 5, padding=2, groups=96, padding_mode="reflect"),
    "unpadded": lambda: nn.Conv2d(96, 96, 5, groups=96),
    "oblong": lambda: nn.Conv2d(96, 96, (5, 3), padding=(2, 1), groups=96),
    "even": lambda: nn.Conv2d(96, 96, 4, padding="same", groups=96),
    "grouped": lambda: nn.Conv2d(96, 96, 5, padding=2, groups=48),
    "normalised": lambda: weight_norm(nn.Conv2d(96, 96, 5, padding=2, groups=96)),
}


@each_module
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_other_convolutions_run(make, other, kernels):
    model = made(make)
    scale = scales_of(model)[0]
    setattr(scale, next(iter(scale._modules)), other().to(DEVICE))
    if other in (OTHERS["unpadded"], OTHERS["strided"]):
        # Of another size, which a single scale makes no sense of; its convolutions must have run.
        x = torch.zeros(2, 96, 6, 10, device=DEVICE)
        y = aggregation.aggregate(x, scale, type(scale))
        assert not kernels and torch.equal(y, scale(x))
    else:
        assert_stock_runs(model, picture(), kernels, 1)


@pytest.mark.parametrize("groups", [1, 3])
@torch.no_grad()
def test_other_products_run(groups, kernels):
    x = torch.randn(1, 192 * groups, 4, 4, device=DEVICE)
    first, second = (
        nn.Conv2d(192 * groups, 192 * groups, size, padding=size // 2, groups=n)
        for size, n in ((3, 192 * groups), (1, groups))
    )
    scale = nn.Sequential(first, second).to(DEVICE)
    y = aggregation.aggregate(x, scale, nn.Sequential)
    assert not kernels and torch.equal(y, scale(x))
    longer = nn.Sequential(*lite_mla().aggreg[0], nn.ReLU()).to(DEVICE)
    y = aggregation.aggregate(x[:, :96], longer, nn.Sequential)
    assert not kernels and torch.equal(y, longer(x[:, :96]))


@each_module
@torch.no_grad()
def test_autocast_to_another_dtype_is_left_to_stock(make, kernels):
    model, x = made(make), picture()
    fbila.accelerate(model)
    scale, first = scales_of(model)[0], torch.randn(1, 96, 4, 4, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        model[0](x)
        assert aggregation.aggregate(first, scale, type(scale)).dtype == torch.bfloat16
    assert not kernels


@torch.no_grad()
def test_transforms_go_through_stock(kernels):
    # Traces hold weights as constants, which must not want a gradient.
    scale = made(lite_mla)[0].aggreg[0].requires_grad_(False)
    x = torch.randn(2, 96, 4, 4, device=DEVICE)
    stock = scale(x)
    y = torch.vmap(lambda x: aggregation.aggregate(x[None], scale, nn.Sequential)[0])(x)
    assert not kernels
    torch.testing.assert_close(y, stock)
    _, slope = torch.func.jvp(lambda x: aggregation.aggregate(x, scale, nn.Sequential), (x,), (x,))
    assert not kernels and slope.any()
    traced = torch.jit.trace(
        lambda x: aggregation.aggregate(x, scale, nn.Sequential), x, check_trace=False
    )
    assert not kernels
    torch.testing.assert_close(traced(2 * x), scale(2 * x))


@each_module
@pytest.mark.parametrize("frozen", [True, False])
def test_it_compiles_as_one_operator(make, frozen, monkeypatch):
    monkeypatch.setattr(aggregation, "has_kernels", lambda x: True)
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    model, x = made(make).requires_grad_(not frozen), picture()
    stock = model[0](x)
    fbila.accelerate(model)
    compiled = torch.compile(model[0].forward, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x), stock, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert any("separable_conv2d" in target for target in graphs[0]) is frozen

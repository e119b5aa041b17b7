"""LiteMLA as one operation, where its modules are plain ones, and by its modules elsewhere."""

import copy

import pytest
import torch
from helpers import CUDA, DEVICE
from test_lite_mla import by_hand
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from vision_contracts import assert_formula, randomize, run

from fbila.layers import LiteMLA, lite_mla, lite_mla_weights

FORMATS = (torch.contiguous_format, torch.channels_last)
each_format = pytest.mark.parametrize("order", FORMATS, ids=str)


@pytest.fixture
def calls(monkeypatch):
    """Pictures of which the operation is called; its kernels are interpreted without a GPU."""
    pictures: list[torch.Tensor] = []
    operation = lite_mla.lite_mla

    def watched(x, *rest):
        pictures.append(x)
        return operation(x, *rest)

    monkeypatch.setattr(lite_mla, "lite_mla", watched)
    monkeypatch.setattr(lite_mla_weights, "has_kernels", lambda x: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return pictures


def make(**settings):
    torch.manual_seed(0)
    layer = randomize(LiteMLA(32, **{"dim": 16, **settings})).eval()
    return layer.to(DEVICE), torch.randn(2, 32, 3, 5, device=DEVICE)


def by_modules(monkeypatch, layer, x):
    """`run` of the same layer by its modules."""
    with monkeypatch.context() as patch:
        patch.setattr(lite_mla_weights, "has_kernels", lambda x: False)
        return run(layer, x)


def assert_same(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(CUDA, reason="the hand's parameters are on the CPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 16},
        {"dim": 8, "scales": ()},
        {"dim": 16, "scales": (3, 5), "use_bias": True, "norm_layer": None},
        {"dim": 16, "heads_ratio": 2.0, "out_channels": 24},
    ],
    ids=str,
)
@each_format
def test_formula(calls, monkeypatch, order, settings):
    monkeypatch.setattr(lite_mla_weights, "_DTYPES", (torch.float32, torch.float64))
    layer = LiteMLA(32, **settings).eval()
    x = torch.randn(2, 32, 5, 7).to(memory_format=order)
    assert_formula(layer, by_hand, x, dim=settings["dim"], scales=settings.get("scales", (5,)))
    assert [t.dtype for t in calls] == [torch.float32, torch.float64]


@each_format
def test_inference(calls, monkeypatch, order):
    layer, x = make()
    x = x.to(memory_format=order)
    (expected, _) = by_modules(monkeypatch, layer, x)
    with torch.no_grad():
        y = layer(x)
    assert len(calls) == 1 and y.is_contiguous(memory_format=order)
    assert_same(y, expected)
    with torch.inference_mode():
        assert_same(layer(x), expected)


def test_training(calls, monkeypatch):
    layer, x = make(use_bias=True)
    other = copy.deepcopy(layer).train()
    found, expected = run(layer.train(), x), by_modules(monkeypatch, other, x)
    assert len(calls) == 1
    assert_same(found, expected)
    assert_same(layer.proj.norm.running_mean, other.proj.norm.running_mean)
    assert layer.proj.norm.num_batches_tracked == 1


def test_some_weights_are_frozen(calls, monkeypatch):
    layer, x = make()
    layer.requires_grad_(False)
    layer.aggreg[0][0].weight.requires_grad_()
    layer(x).square().sum().backward()
    found = layer.aggreg[0][0].weight.grad
    assert len(calls) == 1 and layer.qkv.conv.weight.grad is None
    layer.aggreg[0][0].weight.grad = None
    monkeypatch.setattr(lite_mla_weights, "has_kernels", lambda x: False)
    layer(x).square().sum().backward()
    assert_same(found, layer.aggreg[0][0].weight.grad)


MODULES = ["qkv", "qkv.conv", "aggreg.0", "aggreg.0.0", "aggreg.0.1", "proj", "proj.conv"]


@pytest.mark.parametrize("name", MODULES)
def test_hooks_are_called(calls, monkeypatch, name):
    layer, x = make()
    expected = by_modules(monkeypatch, layer, x)[0]
    seen = []
    handle = layer.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append(y))
    assert_same(layer(x), expected)
    assert len(seen) == 1 and not calls
    handle.remove()
    layer.get_submodule(name).register_full_backward_hook(lambda *_: seen.append(None))
    run(layer, x)
    assert len(seen) == 2 and not calls


def test_a_hook_of_the_norm_is_called(calls):
    layer, x = make()
    seen = []
    layer.proj.norm.register_forward_hook(lambda _, __, y: seen.append(y))
    layer(x)
    assert len(seen) == len(calls) == 1


def dilate(layer):
    layer.aggreg[0][0].dilation, layer.aggreg[0][0].padding = (2, 2), (4, 4)


def wrap_around(layer):
    layer.aggreg[0][0] = nn.Conv2d(96, 96, 5, padding=2, groups=96, padding_mode="circular")


def wider_groups(layer):
    layer.aggreg[0][1] = nn.Conv2d(96, 96, 1, groups=3)


def normed_weight(layer):
    weight_norm(layer.qkv.conv)


def after_qkv(layer):
    layer.qkv.append(nn.Tanh())


def own_forward(layer):
    layer.proj.conv.forward = lambda x: x[:, :32].sin()


def double(layer):
    layer.double()


CHANGES = [dilate, wrap_around, wider_groups, normed_weight, after_qkv, own_forward, double]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_modules_are_called(calls, monkeypatch, change):
    layer, x = make()
    change(layer)
    layer.to(DEVICE)
    x = x.to(next(layer.parameters()).dtype)
    assert_same(run(layer, x), by_modules(monkeypatch, layer, x))
    assert not calls


@pytest.mark.parametrize("settings", [{"scales": (7,)}, {"scales": (5, 1)}], ids=str)
def test_other_sizes_of_kernels(calls, settings):
    layer, x = make(**settings)
    run(layer, x)
    assert not calls


def test_a_module_after_the_norm(calls, monkeypatch):
    layer, x = make()
    layer.proj.append(nn.Tanh())
    assert_same(run(layer, x), by_modules(monkeypatch, layer, x))
    assert len(calls) == 1


def test_transforms_and_traces_see_modules(calls):
    layer, x = make()
    expected = layer(x)
    calls.clear()
    with torch.no_grad():
        assert_same(torch.func.vmap(lambda t: layer(t[None])[0])(x), expected)
        torch.jit.trace(layer, x, check_trace=False)
    assert not calls


@each_format
def test_autocast(calls, monkeypatch, order):
    """The interpreter computes no bfloat16, so that it is float16 without a GPU."""
    dtype = torch.bfloat16 if CUDA else torch.float16
    layer, x = make(norm_layer=None, scales=(3, 5), use_bias=True)
    x = x.to(memory_format=order)
    expected = run(layer, x)
    calls.clear()
    with torch.autocast(DEVICE, dtype):
        found = run(layer, x)
        assert layer(x).dtype == dtype
    assert [t.dtype for t in calls] == [dtype] * 2
    assert found[1].dtype == torch.float32
    for ours, truth in zip(found, expected, strict=True):
        assert (ours.float() - truth).norm() <= (5e-2 if CUDA else 1e-2) * truth.norm()
    (weight,) = torch.autograd.grad(layer(x).sum(), layer.qkv.conv.weight)
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graphs(calls, monkeypatch, backend):
    layer, x = make()
    expected = by_modules(monkeypatch, layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    assert_same(run(compiled, x), expected)
    with torch.no_grad():
        assert_same(compiled(x), expected[0])
    other = torch.randn(3, 32, 4, 7, device=DEVICE)
    assert_same(run(compiled, other), by_modules(monkeypatch, layer, other))


def test_the_operation_is_in_the_graph(monkeypatch):
    monkeypatch.setattr(lite_mla_weights, "has_kernels", lambda x: True)
    layer, x = make()
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert "fbila.lite_mla" in names


def test_backward_under_autocast_is_of_the_dtypes_of_the_forward_pass(calls):
    layer, x = make(norm_layer=None)
    y, leaves = layer(x), list(layer.parameters())
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = torch.autograd.grad(y, leaves, dy)
    assert len(calls) == 1
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)

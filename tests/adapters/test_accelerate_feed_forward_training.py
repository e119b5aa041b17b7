"""Feed-forward layers around linear attention in training, by kernels, under autocast too.

On a CPU the kernels run through Triton's interpreter.
"""

import copy

import pytest
import torch
from feed_forward_layers import LAYERS, each_layer, error
from feed_forward_layers import kernels as kernels
from helpers import DEVICE, LOW
from linear_models import CASES
from torch import nn

import fbila


def gradients(model: nn.Module, x, wanted=lambda name: True, autocast=None):
    """Of a loss by x and by the weights that are wanted, by name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
        parameter.grad = None
    x = x.detach().clone().requires_grad_(wanted("x"))
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = model(x)
    # Both signs, and not of y alone.
    (y.float() if autocast else y).sub(0.3).square().mean().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


@each_layer
def test_gradients_are_those_of_stock(name, kernels):
    make, x = LAYERS[name]
    model = make()
    expected = gradients(model, x)
    with fbila.accelerate(model):
        actual = gradients(model, x)
    assert kernels == {"gated_depthwise_conv": 1}
    assert actual.keys() == expected.keys() and None not in actual.values()
    for key, y in expected.items():
        bound = 1e-5 * float(y.abs().max())
        torch.testing.assert_close(actual[key], y, rtol=1e-4, atol=bound, msg=key)
        assert actual[key].dtype == y.dtype


@each_layer
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half"])
def test_in_half_precision_they_err_no_more(name, autocast, dtype, kernels):
    make, x = LAYERS[name]
    model = make()
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    truth = gradients(copy.deepcopy(model).double(), x.double())
    stock = gradients(model, x, autocast=dtype if autocast else None)
    fbila.accelerate(model)
    fast = gradients(model, x, autocast=dtype if autocast else None)
    assert kernels == {"gated_depthwise_conv": 1}
    assert all(fast[key].dtype == stock[key].dtype for key in truth)
    fast, stock = ([error(x[key], exact) for key, exact in truth.items()] for x in (fast, stock))
    # In what is rounded once in both it is chance which of them is nearer.
    assert sum(fast) <= sum(stock)
    assert all(x <= 1.25 * y for x, y in zip(fast, stock, strict=True))


@pytest.mark.parametrize("name", ["Sana", "DC-AE", "SanaVideo"])
@pytest.mark.parametrize(
    "wanted",
    ["x", "conv_inverted.weight", "conv_depth.weight", "conv_depth.bias", "conv_point", "bias"],
)
def test_frozen_weights_get_no_gradient(name, wanted, kernels):
    make, x = LAYERS[name]
    model = make()
    expected = gradients(model, x, lambda name: wanted in name.split("layer.")[-1])
    fbila.accelerate(model)
    actual = gradients(model, x, lambda name: wanted in name.split("layer.")[-1])
    assert kernels["gated_depthwise_conv"] == 1
    for key, y in expected.items():
        if y is None:
            assert actual[key] is None
        else:
            bound = 1e-5 * float(y.abs().max())
            torch.testing.assert_close(actual[key], y, rtol=1e-4, atol=bound, msg=key)


@each_layer
@pytest.mark.parametrize("part", ["conv_inverted", "nonlinearity", "conv_depth", "conv_point"])
def test_hooks_on_gradients_are_called(name, part, kernels):
    make, x = LAYERS[name]
    model, called = make(), []
    handle = fbila.accelerate(model)
    model.layer.get_submodule(part).register_full_backward_hook(lambda *_: called.append(part))
    gradients(model, x)
    fast = len(called)
    handle.unmount()
    gradients(model, x)
    assert len(called) == 2 * fast > 0
    assert not kernels


@pytest.mark.parametrize("name", ["Sana", "SanaVideo"])
@torch.no_grad()
def test_inference_under_autocast(name, kernels):
    make, x = LAYERS[name]
    for dtype in LOW:
        model = make()
        truth = copy.deepcopy(model).double()(x.double())
        with torch.autocast(DEVICE, dtype):
            stock = model(x)
            fbila.accelerate(model)
            fast = model(x)
            # What autocast leaves alone has no other dtype either.
            with pytest.raises(RuntimeError, match=r"type|dtype"):
                model(x.double())
        assert fast.dtype == stock.dtype
        assert error(fast, truth) <= 1.01 * error(stock, truth)
    assert kernels == {"gated_depthwise_conv": len(LOW)}


@pytest.mark.parametrize("name", ["Sana", "SanaVideo", "ControlNet"])
def test_whole_models(name, kernels):
    case = CASES[name]
    model = case.make().requires_grad_(True)

    def of_loss():
        model.zero_grad()
        case.run(model).square().mean().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = of_loss()
    with fbila.accelerate(model):
        actual = of_loss()
    assert kernels["gated_depthwise_conv"] > 0 and not kernels["rms_norm"]
    assert actual.keys() == expected.keys()
    # Some are 0 but for rounding, as those of biases of keys of softmax attention.
    bound = 1e-5 * max(float(y.abs().max()) for y in expected.values())
    for key, y in expected.items():
        torch.testing.assert_close(actual[key], y, rtol=1e-3, atol=bound, msg=key)


def test_checkpointing(kernels):
    case = CASES["Sana"]
    model = case.make().requires_grad_(True).train()
    fbila.accelerate(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        case.run(model).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
        model.enable_gradient_checkpointing()
    assert kernels == {"gated_depthwise_conv": 6}
    for x, y in zip(*found, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@each_layer
def test_graphs_have_stocks_forward(name, kernels):
    make, x = LAYERS[name]
    model = make()
    stock = model(x)
    fbila.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock)
    assert not kernels

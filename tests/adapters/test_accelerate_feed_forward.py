"""The norms and feed-forward layers around linear attention, by kernels.

On a CPU the kernels run through Triton's interpreter.
"""

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv
from feed_forward_layers import LAYERS, each_layer, error, normal
from feed_forward_layers import kernels as kernels
from helpers import DEVICE, LOW
from linear_models import CASES
from torch import nn

import fbila
from fbila.adapters.acceleration import inference, plan


@each_layer
@torch.no_grad()
def test_a_layer_computes_what_stock_does(name, kernels):
    make, x = LAYERS[name]
    model = make()
    stock = model(x)
    with fbila.accelerate(model) as handle:
        assert handle.report.swapped[0].target.startswith("FastGLUMB")
        fast = model(x)
        if x.dim() == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(model(last), fast)
    assert kernels["gated_depthwise_conv"] == (2 if x.dim() == 4 else 1)
    assert kernels["rms_norm"] == (2 if name == "DC-AE" else 0)
    assert fast.shape == stock.shape and fast.dtype == stock.dtype
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))
    assert torch.equal(model(x), stock)


@each_layer
@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_in_half_precision_it_errs_no_more(name, dtype, kernels):
    make, x = LAYERS[name]
    model, x = make().to(dtype), x.to(dtype)
    truth = copy.deepcopy(model).double()(x.double())
    stock = model(x)
    fbila.accelerate(model)
    fast = model(x)
    assert kernels["gated_depthwise_conv"] == 1
    assert fast.dtype == stock.dtype == dtype
    # What both round, both round alike, but for ties of numbers that differ in their last bits.
    assert error(fast, truth) <= 1.01 * error(stock, truth)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("Sana", {"gated_depthwise_conv": 2}),
        ("Sana, norms", {"gated_depthwise_conv": 2, "rms_norm": 4}),
        ("ControlNet", {"gated_depthwise_conv": 2}),
        ("SanaVideo", {"gated_depthwise_conv": 2, "rms_norm": 4}),
        ("DC-AE", {"gated_depthwise_conv": 4, "rms_norm": 8}),
    ],
)
@torch.no_grad()
def test_whole_models(name, counts, kernels):
    case = CASES[name]
    model = case.make()
    stock = case.run(model)
    names = list(model.state_dict())
    with fbila.accelerate(model):
        fast = case.run(model)
        assert list(model.state_dict()) == names
    assert kernels == counts
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))
    assert torch.equal(case.run(model), stock)


@torch.no_grad()
def test_norms_of_what_is_trained_run_stock(kernels):
    make, x = LAYERS["DC-AE"]
    model = make()
    fbila.accelerate(model)
    with torch.enable_grad():
        model(x)
        model.requires_grad_(False)
        model(x.clone().requires_grad_())
    assert kernels == {"gated_depthwise_conv": 2}
    # Nothing wants a gradient, whether or not PyTorch would record one.
    with torch.enable_grad():
        assert not model(x).requires_grad
    assert kernels == {"gated_depthwise_conv": 3, "rms_norm": 1}


@pytest.mark.parametrize("part", ["nonlinearity", "conv_inverted", "conv_depth", "conv_point"])
@torch.no_grad()
def test_hooks_are_heard(part, kernels):
    make, x = LAYERS["DC-AE"]
    model, seen = make(), []
    stock = model(x)
    fbila.accelerate(model)
    hook = getattr(model.layer, part).register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(x), stock)
    assert seen and not kernels
    hook.remove()
    model.layer.norm.register_forward_hook(lambda *_: seen.append(2))
    model(x)
    assert seen[-1] == 2 and kernels == {"gated_depthwise_conv": 1}


@pytest.mark.parametrize("first", ["LoRA", "accelerate"])
@torch.no_grad()
def test_a_lora_on_its_convolutions_is_heard(first, kernels):
    peft = pytest.importorskip("peft")
    case = CASES["Sana"]
    model, stock = case.make(), case.make()
    config = peft.LoraConfig(r=2, target_modules=["conv_inverted"], init_lora_weights=False)
    for number, each in enumerate((stock, model)):
        if number and first == "accelerate":
            fbila.accelerate(each)
        torch.manual_seed(3)
        each.add_adapter(config)
    if first == "LoRA":
        skipped = fbila.accelerate(model).report.reasons()
        assert skipped["has a conv_inverted that is not a plain 1 x 1 convolution"] == 2
    expected = case.run(stock)
    assert error(case.run(case.make()), expected.double()) > 1e-4
    torch.testing.assert_close(case.run(model), expected, rtol=1e-5, atol=1e-5)
    assert not kernels


@torch.no_grad()
def test_weights_of_another_dtype_fail_as_in_stock(kernels):
    make, x = LAYERS["Sana"]
    model = make().half()
    fbila.accelerate(model)
    with pytest.raises(RuntimeError, match=r"type|dtype"):
        model(x)
    assert not kernels


@each_layer
@torch.no_grad()
def test_it_compiles_as_a_whole_and_is_exported(name, kernels):
    make, x = LAYERS[name]
    model = make()
    stock = model(x)
    fbila.accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), stock)
    # Compilers fuse it themselves.
    assert not kernels


def test_layers_of_other_kinds_stay():
    model = nn.ModuleDict({
        name: GLUMBConv(8, 8) for name in ("fine", "wide", "hooked", "activation", "strided")
    })  # fmt: skip
    model["norm"] = GLUMBTempConv(8, 8, norm_type="rms_norm")
    model["wide"].conv_inverted = nn.Conv2d(8, 64, 3, padding=1)
    model["hooked"].conv_point.forward = lambda x: x
    model["activation"].nonlinearity = nn.GELU()
    model["strided"].conv_depth.stride = (2, 2)
    report = plan(model)
    assert [entry.name for entry in report.swapped] == ["fine"]
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "wide": "has a conv_inverted that is not a plain 1 x 1 convolution",
        "hooked": "has a conv_point that is not a plain 1 x 1 convolution",
        "activation": "has the activation GELU, not a plain SiLU",
        "strided": "has a conv_depth that is not a plain depthwise 3 x 3 convolution",
        "norm": "has a norm, which goes over the frames in stock",
    }
    assert "?" not in str(report) and "0 x 0" not in str(report)


KINDS = (torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("kept", [None, *KINDS], ids=str)
@pytest.mark.parametrize("bias", [None, *KINDS], ids=str)
@torch.no_grad()
def test_norms_return_the_dtype_of_stock(dtype, kept, bias, kernels):
    x, norm = (3 + normal(5, 24)).to(dtype), RMSNorm(24, 1e-5, kept is not None, bias is not None)
    for name, kind in (("weight", kept), ("bias", bias)):
        if getattr(norm, name) is not None:
            setattr(norm, name, nn.Parameter(normal(24).to(kind)))
    norm.to(DEVICE)
    stock, fast = norm(x), inference.normalize(norm, x)
    assert kernels == {"rms_norm": 1}
    assert fast.dtype == stock.dtype
    half = torch.float16 in (dtype, kept, bias)
    torch.testing.assert_close(
        fast, stock, rtol=4e-3 if half else 1e-5, atol=4e-3 if half else 1e-5
    )


@torch.no_grad()
def test_other_norms_run_themselves(kernels):
    class Other(RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    x = normal(5, 24)
    for norm in (Other(24, 1e-5), nn.RMSNorm(24), nn.LayerNorm(24), RMSNorm((5, 24), 1e-5)):
        norm.to(DEVICE)
        assert torch.equal(inference.normalize(norm, x), norm(x))
    assert not kernels


@torch.no_grad()
def test_clipping_in_place_reaches_nothing_else():
    case = CASES["Sana"]
    model = case.make().half()
    attention = model.transformer_blocks[0].attn1
    attention.to_out[0].bias.fill_(torch.inf)
    fbila.accelerate(model)
    x = normal(2, 12, 24).half()
    before = x.clone()
    y = model.transformer_blocks[0].attn1(x)
    assert (y == 65504).all() and torch.equal(x, before)
    assert (attention.to_out[0].bias == torch.inf).all()

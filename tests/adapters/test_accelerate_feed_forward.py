"""The norms and feed-forward layers around linear attention, by kernels, where nothing is trained.

On a CPU the kernels run through Triton's interpreter.
"""

import copy
from collections import Counter

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv
from helpers import CUDA, DEVICE, LOW
from linear_models import CASES
from torch import Tensor, nn

import fbila
from fbila.adapters import kernel_checks
from fbila.adapters.acceleration import gated_convolutions, inference, plan
from fbila.ops import functional, gated_conv_library, repeated, rms_norm_library

LIBRARIES = {
    "gated_depthwise_conv": (gated_convolutions, gated_conv_library),
    "rms_norm": (inference, rms_norm_library),
}


@pytest.fixture
def kernels(monkeypatch):
    """Has the models run their kernels; counts the calls."""
    called = Counter()

    def counted(name, function):
        def run(*args):
            called[name] += 1
            return function(*args)

        return run

    for name, (user, library) in LIBRARIES.items():
        monkeypatch.setattr(user, name, counted(name, getattr(library, name)))
        if not CUDA:
            monkeypatch.setattr(library, "direct", lambda *_: True)
    if not CUDA:
        monkeypatch.setattr(kernel_checks, "has_kernels", lambda _: True)
    monkeypatch.setattr(functional, "choose_implementation", lambda *_: "triton")
    monkeypatch.setattr(repeated, "_PASSED", {})
    return called


class Holder(nn.Module):
    """A model of one feed-forward layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def hold(kind: type[nn.Module], **options) -> Holder:
    torch.manual_seed(0)
    model = Holder(kind(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(DEVICE)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


_SANA = {"in_channels": 24, "out_channels": 24, "expand_ratio": 2.5, "residual_connection": False}
_DC_AE = {"in_channels": 16, "out_channels": 16, "norm_type": "rms_norm"}
LAYERS = {
    "Sana": (lambda: hold(GLUMBConv, **_SANA), normal(2, 24, 9, 10)),
    "other channels": (
        lambda: hold(GLUMBConv, **{**_SANA, "out_channels": 20}), normal(1, 24, 3, 5),
    ),
    "DC-AE": (lambda: hold(GLUMBConv, **_DC_AE), normal(2, 16, 7, 12)),
    "SanaVideo": (lambda: hold(GLUMBTempConv, **_SANA), normal(2, 3, 4, 6, 24)),
    "SanaVideo, residual": (
        lambda: hold(GLUMBTempConv, in_channels=8, out_channels=8), normal(1, 2, 3, 5, 8),
    ),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)


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


@each_layer
def test_what_is_trained_runs_stock(name, kernels):
    make, x = LAYERS[name]
    model = make()
    expected = model(x)
    fbila.accelerate(model)
    assert torch.equal(model(x), expected)
    model.requires_grad_(False)
    assert torch.equal(model(x.clone().requires_grad_()), expected)
    model.layer.conv_depth.bias.requires_grad_(True)
    assert torch.equal(model(x), expected)
    assert not kernels
    model.requires_grad_(False)
    # Nothing wants a gradient, whether or not PyTorch would record one.
    assert not model(x).requires_grad
    assert kernels["gated_depthwise_conv"] == 1


def test_what_is_in_front_of_a_trained_norm_runs_by_the_kernel(kernels):
    make, x = LAYERS["DC-AE"]
    model = make().requires_grad_(False)
    model.layer.norm.requires_grad_(True)
    model(x).square().sum().backward()
    expected = model.layer.norm.weight.grad.clone()
    model.zero_grad()
    fbila.accelerate(model)
    model(x).square().sum().backward()
    torch.testing.assert_close(model.layer.norm.weight.grad, expected, rtol=1e-4, atol=1e-4)
    assert kernels == {"gated_depthwise_conv": 1}


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


@pytest.mark.parametrize("name", ["Sana", "SanaVideo"])
@torch.no_grad()
def test_autocast(name, kernels):
    make, x = LAYERS[name]
    model = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        stock = model(x)
        fbila.accelerate(model)
        assert torch.equal(model(x), stock)
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

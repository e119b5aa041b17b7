"""What PyTorch, diffusers and timm do with a model they do with an accelerated one too."""

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from helpers import DEVICE
from linear_models import CASES, Case
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd

import fbila
from fbila.adapters import AdapterError, unswap
from fbila.adapters import timm as timm_adapter

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_near(actual, expected, tolerance: float = 1e-5) -> None:
    atol = tolerance * max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=atol)


@each
@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_weights_that_are_loaded_are_those_of_both(case: Case, assign):
    model = case.make()
    other = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with fbila.accelerate(model):
        model.load_state_dict(other, assign=assign)
        fast = case.run(model)
    assert_near(fast, case.run(model))
    stock = case.make()
    stock.load_state_dict(other)
    assert torch.equal(case.run(stock), case.run(model))


@pytest.mark.parametrize("name", ["DC-AE", "EfficientViT"])
def test_batch_norm_learns_the_same_statistics(name):
    case, models = CASES[name], []
    for fast in (False, True):
        model = case.make().train()
        if fast:
            fbila.accelerate(model)
        with torch.no_grad():
            case.run(model)
        models.append(model)
    for expected, actual in zip(*(model.state_dict().values() for model in models), strict=True):
        assert_near(actual.double(), expected.double())
    models[1].eval()
    unswap(models[1])
    assert not any(module.training for module in models[1].modules())


@each
def test_one_projection_alone_is_trained(case: Case):
    model = case.make().requires_grad_(False)
    fbila.accelerate(model)
    names = ("to_q.weight", "qkv.weight", "qkv.conv.weight")
    weight = next(p for name, p in model.named_parameters() if name.endswith(names))
    weight.requires_grad_(True)
    gradients = []
    for _ in range(2):
        weight.grad = None
        case.run(model).square().sum().backward()
        gradients.append(weight.grad)
        if len(gradients) == 1:
            unswap(model)
    assert gradients[0].abs().max() > 0
    assert_near(*gradients, tolerance=1e-4)


@pytest.mark.parametrize("name", ["Sana", "SanaVideo", "EfficientViT"])
def test_checkpointed_gradients(name):
    case, gradients = CASES[name], []
    for checkpointing in (False, True):
        model = case.make().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                module.eval()
        if checkpointing and name == "EfficientViT":
            model.set_grad_checkpointing(True)
        elif checkpointing:
            model.enable_gradient_checkpointing()
        fbila.accelerate(model)
        case.run(model).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                    if p.grad is not None]))  # fmt: skip
    assert_near(*gradients, tolerance=1e-4)


# "aot_eager", but for two operators that Inductor decomposes, too. Their meta kernels promise
# channels_last for channels_last, as on a CPU, and on a GPU they are contiguous: then the graph of
# stock DC-AE fails as that of the accelerated one does.
EAGER = aot_autograd(
    fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
    decompositions=get_decompositions(
        [torch.ops.aten.pixel_shuffle, torch.ops.aten.pixel_unshuffle]
    ),
)


@pytest.mark.parametrize("name", ["Sana", "SanaVideo", "DC-AE", "EfficientViT", "CoaT"])
def test_a_whole_model_compiles_for_training(name):
    torch._dynamo.reset()
    case = CASES[name]
    model = case.make()
    fbila.accelerate(model)
    expected = case.run(model)
    compiled = torch.compile(model, backend=EAGER, fullgraph=True)
    y = case.run(compiled)
    assert_near(y, expected)
    y.square().sum().backward()
    torch._dynamo.reset()


@each
@torch.no_grad()
def test_it_is_exported(case: Case):
    model = case.make()
    fbila.accelerate(model)
    program = torch.export.export(model, (), case.inputs(), strict=False)
    assert_near(case.run(program.module()), case.run(model))


@each
@torch.no_grad()
def test_a_single_picture(case: Case):
    inputs = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    one = case._replace(inputs=lambda: inputs)
    model = case.make()
    stock = one.run(model)
    fbila.accelerate(model)
    assert_near(one.run(model), stock)


@each
@torch.no_grad()
def test_shapes_without_numbers(case: Case):
    inputs = {
        name: x.to("meta") if isinstance(x, Tensor) else x for name, x in case.inputs().items()
    }
    case, model = case._replace(inputs=lambda: inputs), case.make().to("meta")
    stock = case.run(model)
    fbila.accelerate(model)
    y = case.run(model)
    assert y.is_meta and y.shape == stock.shape and y.dtype == stock.dtype


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (32, 95), (64, 31)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_pictures_of_any_shape_down_to_one_position(size, order):
    """In EfficientViT's last level they are 32 times smaller."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    model = CASES["EfficientViT"].make()
    for picture in (x.contiguous(memory_format=order), x.permute(0, 1, 3, 2)):
        stock = model(picture)
        with fbila.accelerate(model):
            assert_near(model(picture), stock)


@torch.no_grad()
def test_features_of_timm():
    x = torch.randn(1, 3, 96, 128, device=DEVICE)
    model = timm.create_model("efficientvit_b0", features_only=True).eval().to(DEVICE)
    stock = model(x)
    fbila.accelerate(model)
    for actual, expected in zip(model(x), stock, strict=True):
        assert_near(actual, expected)
    model = CASES["EfficientViT"].make()
    stock = create_feature_extractor(model, ["stages.3"])(x)
    fbila.accelerate(model)
    assert_near(create_feature_extractor(model, ["stages.3"])(x)["stages.3"], stock["stages.3"])


@torch.no_grad()
def test_tiles_and_slices_of_an_autoencoder():
    model = CASES["DC-AE"].make()
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    for turn_on in (model.enable_slicing, lambda: model.enable_tiling(32, 32, 24, 24)):
        turn_on()
        stock = model(x).sample
        with fbila.accelerate(model):
            assert_near(model(x).sample, stock)


@torch.no_grad()
def test_one_swap_at_a_time():
    model = CASES["EfficientViT"].make()
    fbila.accelerate(model, include=".*stages.2.*")
    for other in (timm_adapter.swap, fbila.accelerate):
        with pytest.raises(AdapterError, match="EfficientVit carries a swap already"):
            other(model)
    unswap(model)
    with pytest.raises(AdapterError, match="carries no swap, there is nothing to undo"):
        unswap(model)
    fbila.accelerate(model).unmount()

"""Queries, keys and values by one product, or by what was put in the place of one.

DC-AE's always, Sana's where all three are trained.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from helpers import DEVICE
from torch import nn

import fbila

NAMES = ["to_q", "to_k", "to_v"]


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights that pictures are multiplied with."""
    shapes = []
    linear = F.linear

    def counted(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    return shapes


def made() -> nn.ModuleList:
    torch.manual_seed(0)
    attention = SanaMultiscaleLinearAttention(32, 32, attention_head_dim=16)
    return nn.ModuleList([attention]).eval().to(DEVICE)


def picture():
    return torch.randn(2, 32, 6, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_like_stock(model, products, expected):
    x = picture()
    stock = model[0](x)
    with fbila.accelerate(model):
        products.clear()
        fast = model[0](x)
    assert products == expected
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


def test_they_are_one_product(products):
    assert_like_stock(made(), products, [(96, 32), (32, 64)])


def test_gradients_are_those_of_stock():
    model, x = made(), picture().requires_grad_()
    leaves = [x, *(model[0].get_submodule(name).weight for name in NAMES)]
    stock = torch.autograd.grad(model[0](x).square().sum(), leaves)
    fbila.accelerate(model)
    fast = torch.autograd.grad(model[0](x).square().sum(), leaves)
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_are_called(name, hook, products):
    model, called = made(), []
    getattr(model[0].get_submodule(name), hook)(lambda *args: called.append(args))
    assert_like_stock(model, products, [(32, 32)] * 3 + [(32, 64)])
    assert len(called) == 2


class Doubled(nn.Linear):
    """Another library's linear map."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "other", [lambda: nn.Linear(32, 32), lambda: Doubled(32, 32, bias=False)], ids=["bias", "kind"]
)
@torch.no_grad()
def test_other_maps_run(other, products):
    model = made()
    model[0].to_k = other().to(DEVICE)
    assert_like_stock(model, products, [(32, 32)] * 3 + [(32, 64)])


def made_sana(**options) -> nn.ModuleList:
    torch.manual_seed(0)
    processor = SanaLinearAttnProcessor2_0()
    return nn.ModuleList([Attention(24, heads=3, dim_head=8, processor=processor, **options)]).to(
        DEVICE
    )


def tokens():
    return torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_gradients_like_stock(model, products, expected, autocast=False):
    x = tokens().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def of_loss():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = model[0](x)
        return torch.autograd.grad(y.float().square().sum(), leaves)

    stock = of_loss()
    with fbila.accelerate(model):
        products.clear()
        fast = of_loss()
    assert products == expected
    for actual, each in zip(fast, stock, strict=True):
        size = (6e-2 if autocast else 1e-5) * float(each.abs().max())
        assert actual.dtype == each.dtype
        torch.testing.assert_close(actual, each, rtol=0, atol=size)


@pytest.mark.parametrize("autocast", [True, False])
def test_sanas_are_one_product_where_they_are_trained(autocast, products):
    assert_gradients_like_stock(made_sana(), products, [(72, 24), (24, 24)], autocast)


@pytest.mark.parametrize("frozen", [NAMES, NAMES[:1]])
def test_sanas_are_three_where_one_is_frozen(frozen, products):
    model = made_sana()
    for name in frozen:
        model[0].get_submodule(name).requires_grad_(False)
    assert_gradients_like_stock(model, products, [(24, 24)] * 4)


def test_sanas_are_three_where_they_are_something_else(products):
    assert_gradients_like_stock(made_sana(bias=True), products, [(24, 24)] * 4)
    model = made_sana()
    model[0].to_v = nn.Sequential(model[0].to_v)
    assert_gradients_like_stock(model, products, [(24, 24)] * 4)
    model, called = made_sana(), []
    model[0].to_k.register_forward_hook(lambda *args: called.append(args))
    assert_gradients_like_stock(model, products, [(24, 24)] * 4)
    assert len(called) == 2


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_are_called(hook, products):
    model, called = made_sana(), []
    getattr(model[0].to_k, hook)(lambda *args: called.append(args))
    assert_gradients_like_stock(model, products, [(24, 24)] * 4)
    assert len(called) == 2


@torch.no_grad()
def test_sanas_are_three_in_inference(products):
    model, x = made_sana(), tokens()
    with fbila.accelerate(model):
        model[0](x)
    assert products == [(24, 24)] * 4


def test_one_product_errs_no_more_under_autocast():
    """Its gradient of x is summed in the product, and rounded once."""
    model, x = made_sana(), tokens().requires_grad_()

    def gradient(kind=None):
        with torch.autocast(DEVICE, kind or torch.bfloat16, enabled=kind is not None):
            y = model[0](x)
        return torch.autograd.grad(y.float().sub(0.1).square().sum(), x)[0]

    truth = gradient()
    errors = []
    for _ in range(2):
        errors.append(float((gradient(torch.bfloat16) - truth).norm()))
        if len(errors) == 1:
            fbila.accelerate(model)
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_what_sanas_output_map_reads_under_autocast(dtype):
    """Its heads as they are, or in the dtype of the input where somebody listens."""
    model, x = made_sana(), tokens().to(dtype)
    fbila.accelerate(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = model[0](x)
        seen = []
        model[0].to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        assert torch.equal(model[0](x), expected)
    assert expected.dtype == torch.bfloat16 and seen == [dtype]

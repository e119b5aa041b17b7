"""The queries, keys and values of DC-AE by one product, or by what was put in the place of one."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
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

"""What a module is made of is found wherever `module.<name>` finds it; which return their input."""

from collections import OrderedDict

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.utils import parametrize

from fbila.layers.plain_modules import idle, parameter


class Gathering(OrderedDict):
    """As DeepSpeed's: a parameter that is elsewhere is there once it is asked for."""

    def __getitem__(self, name):
        gathered = super().__getitem__(name)
        return None if gathered is None else gathered.expand(3)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_those_that_are_gathered():
    module = nn.Module()
    module._parameters = Gathering(weight=nn.Parameter(torch.ones(1)), bias=None)
    assert parameter(module, "weight").shape == module.weight.shape == (3,)
    assert parameter(module, "bias") is None


def test_those_that_are_computed():
    module = nn.Linear(2, 3)
    assert parameter(module, "weight") is module.weight
    parametrize.register_parametrization(module, "weight", Double())
    torch.testing.assert_close(parameter(module, "weight"), module.weight, rtol=0, atol=0)


def test_those_that_are_none():
    assert parameter(nn.Linear(2, 3, bias=False), "bias") is None
    with pytest.raises(AttributeError, match="no attribute 'gamma'"):
        parameter(nn.Linear(2, 3), "gamma")


@pytest.mark.parametrize("kind", [nn.Dropout, DropPath])
def test_dropout_is_off_in_evaluation_or_with_a_probability_of_0(kind):
    dropout = kind(0.5)
    assert not idle(dropout, kind)
    assert idle(dropout.eval(), kind)
    assert idle(kind(0.0), kind)
    assert not idle(kind(0.0), nn.Dropout1d)
    handle = dropout.register_forward_hook(lambda *_: None)
    assert not idle(dropout, kind)
    handle.remove()
    assert idle(dropout, kind)


def test_other_modules_are_not_off():
    assert idle(nn.Identity())
    assert not idle(nn.ReLU().eval())
    assert not idle(nn.Dropout2d(0.0).eval())

"""What a module is made of is found wherever `module.<name>` finds it."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fbila.layers.plain_modules import parameter


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

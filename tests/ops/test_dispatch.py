"""Calls by the dispatcher, as compiled graphs make them, take the short way where there is one."""

import pytest
import torch
from helpers import DEVICE

from fbila.ops import autograd
from fbila.ops.autograd import LinearAttn

NONE = (None,) * 5
OPTIONS = ("elu1", "mean", "none", 1.0, 1e-6)


@pytest.fixture
def qkv():
    return [torch.randn(1, 2, 5, 4, device=DEVICE) for _ in range(3)]


@pytest.fixture
def without_function(monkeypatch):
    """Autograd's function refuses; what lies where counts as on a GPU."""

    def refuse(*_):
        raise AssertionError("autograd's function was called")

    monkeypatch.setattr(LinearAttn, "forward", staticmethod(refuse))
    monkeypatch.setattr(autograd, "direct", autograd.ordinary)


def test_without_gradients_the_kernel_is_called(qkv, without_function):
    expected = autograd.linear_attn_directly(*qkv, *NONE, *OPTIONS)
    with torch.no_grad():
        actual = torch.ops.fbila.linear_attn(*(x.requires_grad_() for x in qkv), *NONE, *OPTIONS)
    assert torch.equal(actual, expected)


def test_with_gradients_it_is_not(qkv, without_function):
    qkv[0].requires_grad_()
    with pytest.raises(AssertionError, match="was called"):
        torch.ops.fbila.linear_attn(*qkv, *NONE, *OPTIONS)

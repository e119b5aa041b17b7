"""Every layer has an example, and the examples run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from fbila import layers

MODULES = [f"{layers.__name__}.{module.name}" for module in pkgutil.iter_modules(layers.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", layers.__all__)
def test_every_layer_has_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(layers, name))

"""Every backbone has an example, and the examples run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
from torch import nn

from fbila import models

MODULES = [f"{models.__name__}.{module.name}" for module in pkgutil.iter_modules(models.__path__)]
BACKBONES = [name for name in models.__all__ if inspect.isclass(getattr(models, name))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_an_example(name):
    backbone = getattr(models, name)
    assert issubclass(backbone, nn.Module) and ">>>" in inspect.getdoc(backbone)

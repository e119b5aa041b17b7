"""Fixtures of the operator tests."""

import numpy
import pytest
import torch
from helpers import CUDA

LAUNCHERS = [
    "fbila.ops.kernels.state.launch_state",
    "fbila.ops.kernels.output.launch_output",
    "fbila.ops.kernels.grad_query.launch_grad_query",
    "fbila.ops.kernels.grad_key.launch_grad_key",
]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not CUDA:
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """The interpreter computes with numpy, which warns of the inf and NaN that tests are about."""
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """The names of the launchers in the order they are called; they compute nothing."""
    called = []
    for path in LAUNCHERS:
        monkeypatch.setattr(path, lambda *args, path=path, **options: called.append(path))
    return called


@pytest.fixture
def deterministic_algorithms():
    """Determinism as PyTorch asks for it, which also fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_kernels(monkeypatch):
    """Short sequences take the kernels of longer ones."""
    monkeypatch.setattr("fbila.ops.kernels.short.LONGEST", 0)
    monkeypatch.setattr("fbila.ops.repeated._PASSED", {})

"""Where there is no GPU, the kernels run through Triton's interpreter; it is chosen at import."""

import gc
import os

# Looked at when numpy and torch are loaded. Tensors this small wait for threads more than they
# compute, and longer where several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.hasten()


def pytest_collection_finish():
    """What was imported stays: looking through it again and again for garbage takes its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Tests that change what is launched, or look at it, are not served by what others launched."""
    monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})

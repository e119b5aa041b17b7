"""What the tests of examples have in common."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Small models wait for their threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def new_accelerator():
    """accelerate refuses another precision than the first that a process asked for."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()

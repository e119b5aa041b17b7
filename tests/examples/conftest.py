"""What the tests of examples have in common."""

import pytest


@pytest.fixture(autouse=True)
def new_accelerator():
    """accelerate refuses another precision than the first that a process asked for."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()

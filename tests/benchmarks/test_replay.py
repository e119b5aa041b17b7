"""A step of training as a CUDA graph."""

import gc

import pytest
import torch

from benchmarks.replay import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_step(weight: torch.Tensor):
    """A step whose optimizer nothing else holds."""
    optimizer = torch.optim.AdamW([weight], lr=0.1, capturable=True)

    def step():
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def test_it_trains_when_all_that_is_not_held_is_given_back():
    replayed, plain = (torch.ones(2**20, device="cuda", requires_grad=True) for _ in range(2))
    replay, step = Replay(make_step(replayed)), make_step(plain)
    # The capture is no step.
    for _ in range(3):
        step()
    gc.collect()
    torch.cuda.empty_cache()
    # Whatever was there is written over.
    torch.full((2**22,), float("nan"), device="cuda")
    for _ in range(4):
        torch.testing.assert_close(replay(), step())
    torch.testing.assert_close(replayed, plain)

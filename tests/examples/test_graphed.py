"""examples/graphed.py: replays compute what the step computes, for every shape of its inputs."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import graphed
import recorders

KINDS = [
    pytest.param("stand-in", id="stand-in"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")],
    ),
]


@pytest.fixture(params=KINDS)
def setup(request, monkeypatch):
    """The device, and a list of what is recorded on it."""
    on_gpu = request.param == "cuda"
    recorded = recorders.counting(monkeypatch, graphed.Recorder if on_gpu else recorders.StandIn)
    return ("cuda" if on_gpu else "cpu"), recorded


def model_on(device):
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
    return torch.nn.Sequential(*layers).to(device, torch.float64)


def step_of(model):
    def step(x, more):
        losses = {"total": F.mse_loss(model(x), more["target"]), "size": x.square().mean()}
        losses["total"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    return step


def examples_on(device):
    """Of two numbers of rows, in turn."""
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        x = torch.randn(3 + i % 2, 8, generator=generator, dtype=torch.float64)
        target = torch.randn(3 + i % 2, 4, generator=generator, dtype=torch.float64)
        yield {"x": x.to(device), "more": {"target": target.to(device)}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same(setup, accumulate):
    device, recorded = setup
    results = []
    for graphs in (False, True):
        model = model_on(device)
        step = step_of(model)
        if graphs:
            step = graphed.Graphed(step, model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for i, example in enumerate(examples_on(device)):
            losses.append(step(**example))
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        results.append((losses, list(model.parameters())))
    torch.testing.assert_close(*results)
    assert len(recorded) == 2


def test_what_is_given_stays_as_it_was(setup):
    device, recorded = setup
    model = model_on(device)
    step = graphed.Graphed(step_of(model), model.parameters())
    examples = list(examples_on(device))
    for example in examples:
        step(**example)
    assert len(recorded) == 2
    torch.testing.assert_close(examples, list(examples_on(device)), rtol=0, atol=0)


def test_each_gradient_stays_where_it_is(setup):
    device, _ = setup
    model = model_on(device)
    step = graphed.Graphed(step_of(model), model.parameters())
    places = [p.grad.data_ptr() for p in model.parameters()]
    for example in examples_on(device):
        step(**example)
    assert [p.grad.data_ptr() for p in model.parameters()] == places

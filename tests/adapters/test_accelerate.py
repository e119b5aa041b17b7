"""Models that are linear already compute the same by fbila's kernels, and are themselves again."""

import copy
import doctest
import pickle

import pytest
import torch
from linear_models import CASES, Case
from torch import nn
from untouched import modules

import fbila
from fbila.adapters import acceleration, get_handle, unswap
from fbila.adapters.acceleration import plan
from fbila.ops import functional, repeated

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, through the interpreter where there is no GPU."""
    monkeypatch.setattr(functional, "choose_implementation", lambda *_: "triton")
    # Calls are remembered with the choice.
    monkeypatch.setattr(repeated, "_PASSED", {})


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(acceleration)
    assert tried > failed == 0


@each
@torch.no_grad()
def test_the_kernels_compute_what_stock_does(case: Case, kernels):
    model = case.make()
    stock = case.run(model)
    fbila.accelerate(model)
    torch.testing.assert_close(
        case.run(model), stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max())
    )


@each
@torch.no_grad()
def test_the_output_is_that_of_stock(case: Case):
    model = case.make()
    stock = case.run(model)
    there, keys = modules(model), list(model.state_dict())
    attributes = set(vars(model))
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    handle = fbila.accelerate(model)
    assert len(handle.report.swapped) == case.swapped
    assert list(model.state_dict()) == keys
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    fast = case.run(model)
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5 * float(stock.abs().max()))
    handle.unmount()
    assert modules(model) == there
    assert set(vars(model)) == attributes
    assert torch.equal(case.run(model), stock)


@each
def test_gradients_are_those_of_stock(case: Case):
    assert_gradients_of_stock(case)


@pytest.mark.parametrize("name", ["Sana", "SanaVideo", "EfficientViT"])
def test_the_gradients_of_the_kernels_are_those_of_stock(name, kernels):
    assert_gradients_of_stock(CASES[name])


def assert_gradients_of_stock(case: Case) -> None:
    model = case.make().train()
    # Batch norm and dropout would differ from run to run.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    gradients = []
    for fast in (False, True):
        if fast:
            fbila.accelerate(model)
        model.zero_grad()
        y = case.run(model)
        (y * torch.arange(y.numel(), device=y.device).view_as(y).cos()).sum().backward()
        gradients.append({
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        })  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    # Some are 0 but for rounding, as those of the keys' biases under a softmax.
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-5 * scale)


@each
@torch.no_grad()
def test_the_report_is_the_plan(case: Case):
    model = case.make()
    planned, there = plan(model), modules(model)
    assert modules(model) == there
    assert (len(planned.swapped), len(planned.skipped)) == (case.swapped, case.skipped)
    handle = fbila.accelerate(model)
    assert handle.report == planned
    assert (planned.added_parameters, planned.kept_bytes) == (0, 0)
    for entry in planned.swapped:
        assert type(model.get_submodule(entry.name)).__name__ == entry.target
        attention = "GLUMB" not in entry.source
        assert (entry.heads > 0 < entry.head_dim) is attention
        assert (" x " in entry.shape) is attention
    drifts = handle.check(**case.inputs())
    assert len(drifts) == case.swapped
    assert all(drift.finite and drift.error < 1e-5 for drift in drifts)


@each
@torch.no_grad()
def test_disabled_and_with(case: Case):
    model = case.make()
    stock = case.run(model)
    with fbila.accelerate(model) as handle:
        fast = case.run(model)
        with handle.disabled():
            assert torch.equal(case.run(model), stock)
        assert torch.equal(case.run(model), fast)
    assert torch.equal(case.run(model), stock)
    with pytest.raises(RuntimeError, match="inside"), fbila.accelerate(model):
        raise RuntimeError("inside")
    assert get_handle(model) is None


@each
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(case: Case, duplicate):
    model = case.make()
    stock = case.run(model)
    fbila.accelerate(model)
    fast = case.run(model)
    clone = duplicate(model)
    unswap(model)
    assert torch.equal(case.run(clone), fast)
    for parameter in clone.parameters():
        parameter.mul_(1.5)
    assert torch.equal(case.run(model), stock)
    assert not torch.equal(case.run(clone), fast)
    unswap(clone)
    assert get_handle(clone) is None


@pytest.mark.parametrize("name", ["Sana", "SanaVideo", "DC-AE", "EfficientViT", "CoaT"])
@torch.no_grad()
def test_it_compiles_as_a_whole(name):
    case = CASES[name]
    model = case.make()
    fbila.accelerate(model)
    fast = case.run(model)
    for number, module in enumerate(get_handle(model).modules.values()):
        if number == 0:
            module.forward = torch.compile(module.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(case.run(model), fast)

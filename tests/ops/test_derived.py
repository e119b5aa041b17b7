"""What is made of the same tensors twice is made once, and anew when they are others."""

import gc
import weakref

import pytest
import torch
from helpers import CUDA, DEVICE

import fbila
from fbila.ops.derived import _KEPT, derived


class Double:
    """2 x, counted."""

    def __init__(self, *sources: torch.Tensor) -> None:
        self.sources = sources
        self.count = 0

    def __call__(self, settings: object = None) -> torch.Tensor:
        return derived(self._make, settings, *self.sources)

    def _make(self) -> torch.Tensor:
        self.count += 1
        return sum(self.sources) * 2


def ones() -> torch.Tensor:
    return torch.ones(3, device=DEVICE)


def test_it_is_made_once():
    double = Double(ones(), ones())
    assert double() is double()
    assert double.count == 1


def test_other_settings_are_another_thing():
    double = Double(ones())
    assert double("a") is not double("b")


def test_a_change_in_place_is_seen():
    x, y = ones(), ones()
    for changed in (x, y):
        double = Double(x, y)
        double()
        changed.add_(1)
        assert torch.equal(double(), (x + y) * 2)


def test_other_data_are_seen():
    x = ones()
    double = Double(x)
    double()
    x.data = ones() * 5
    assert torch.equal(double(), ones() * 10)


def test_another_second_tensor_is_seen():
    x, y = ones(), ones()
    Double(x, y)()
    place = y.data_ptr()
    del y
    again = [z for z in (ones() * 3 for _ in range(50)) if z.data_ptr() == place] or [ones() * 3]
    assert torch.equal(Double(x, again[0])(), ones() * 8)


def test_nothing_is_kept_longer_than_its_source():
    x = ones()
    result = weakref.ref(Double(x)())
    assert x in _KEPT and result() is not None
    del x
    gc.collect()
    assert result() is None


def test_what_may_change_unseen_is_made_each_time():
    learned = Double(ones().requires_grad_())
    learned()
    learned().sum().backward()
    assert learned.count == 2
    with torch.inference_mode():
        unwatched = Double(ones())
        unwatched()
        unwatched()
    assert unwatched.count == 2


def test_what_was_made_in_inference_mode_can_be_differentiated_with():
    double, weight = Double(ones()), ones().requires_grad_()
    with torch.inference_mode():
        double()
    (double() * weight).sum().backward()
    assert double.count == 1
    assert torch.equal(weight.grad, ones() * 2)


def test_tracing_sees_it_made():
    x = ones()
    Double(x)()
    compiled = torch.compile(lambda x: Double(x)() + 1, backend="eager", fullgraph=True)
    x.mul_(3)
    assert torch.equal(compiled(x), ones() * 7)


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_a_trace_makes_it_too():
    x = ones()
    Double(x)()
    traced = torch.jit.trace(lambda x: Double(x)() + 1, x)
    assert torch.equal(traced(ones() * 3), ones() * 7)


@pytest.mark.gpu
def test_a_graph_makes_its_own():
    double = Double(ones())
    outside, graph = double(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = double()
    assert inside is not outside
    double.sources[0].add_(1)
    graph.replay()
    assert torch.equal(inside, ones() * 4)


@pytest.mark.gpu
def test_a_stream_has_its_own():
    double = Double(ones())
    here = double()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert double() is not here


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_table_is_made_once_for_all_layers(interleaved, monkeypatch):
    angles = torch.linspace(0, 1, 40, device=DEVICE).view(10, 4)
    rotary = fbila.Rotary(angles.cos(), angles.sin(), interleaved)
    q = torch.randn(1, 2, 10, 8, device=DEVICE)
    impl = "triton"
    made = []
    name = "stack" if interleaved else "cat"
    right = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args: made.append(1) or right(*args))
    calls = [fbila.linear_attn(q, q, q, feature_map="relu", rotary=rotary, impl=impl)] * 2
    calls.append(fbila.linear_attn(q, q, q, feature_map="relu", rotary=rotary, impl=impl))
    assert len(made) == 1
    assert torch.equal(calls[0], calls[2])
    rotary.cos.mul_(0.5)
    other = fbila.linear_attn(q, q, q, feature_map="relu", rotary=rotary, impl=impl)
    assert len(made) == 2
    assert not torch.equal(other, calls[0])
    if not CUDA:
        twice = fbila.linear_attn(*[q.double()] * 3, feature_map="relu", rotary=rotary, impl=impl)
        assert len(made) == 3
        torch.testing.assert_close(twice.float(), other)

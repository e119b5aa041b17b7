"""Percentiles, and the time until a call returns. Device events and graphs need a GPU."""

import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import CudaTimer, make_timer, quantiles, time_host


def test_quantiles():
    assert quantiles(range(11)) == (5, 2, 8)
    assert quantiles([3.0]) == (3, 3, 3)


def test_host_time_is_that_of_the_median_call():
    calls = []

    def call():
        calls.append(1)
        if len(calls) % 10 == 0:
            time.sleep(2e-3)

    synchronized = []
    measured = time_host(call, lambda: synchronized.append(1), count=200)
    assert len(calls) == 220
    assert len(synchronized) == 3
    assert 0 < measured.ms_20 <= measured.ms <= measured.ms_80 < 1


def test_quick_measures_less():
    assert make_timer(quick=True).budget_ms < make_timer(quick=False).budget_ms


@pytest.mark.parametrize("estimate, count", [(0.001, 1000), (1.0, 300), (500.0, 10)])
def test_repeats(estimate, count):
    assert CudaTimer(300.0).count(estimate) == count


class TestDeviceMethods:
    """The arithmetic around events and graphs, on a device whose clock each call advances."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """Milliseconds of device time; a call takes 2, a replay as long as the calls captured."""
        now = [0.0]

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.ms = now[0]

            def elapsed_time(self, end):
                return end.ms - self.ms

        class Graph:
            def replay(self):
                now[0] += self.ms

        @contextmanager
        def capturing(graph, stream):
            start = now[0]
            yield
            graph.ms = now[0] - start
            now[0] = start

        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capturing,
            "current_stream": lambda: None,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return now

    @pytest.mark.parametrize("method", ["events", "graph"])
    @pytest.mark.parametrize("sets", [1, 3])
    def test_time_of_a_call(self, clock, method, sets):
        called = []

        def call(i):
            called.append(i)
            clock[0] += 2.0

        timer = CudaTimer(5.0)
        measured = timer.time(method, [lambda i=i: call(i) for i in range(sets)])
        assert measured == pytest.approx((2.0, 2.0, 2.0))
        assert set(called) == set(range(sets))
        if method == "graph":  # whole turns
            assert called[-sets:] == list(range(sets))

    def test_bandwidth(self, clock, monkeypatch):
        class Copy:
            def copy_(self, x):
                clock[0] += 6.0

        def faster(x, out):
            clock[0] += 4.0

        monkeypatch.setattr(timing, "_copy_pair", lambda nbytes, device: (None, Copy()))
        monkeypatch.setattr(torch, "neg", faster)
        monkeypatch.setattr(CudaTimer, "sets", lambda self, nbytes: 1)
        timer = CudaTimer(5.0)
        assert timer.bandwidth("graph") == pytest.approx(2 * timing.COPY_BYTES / 4e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnDevice:
    @pytest.fixture
    def timer(self):
        timer = make_timer(quick=True)
        with timer.stream():
            yield timer

    def test_sets_fill_the_cache_four_times(self, timer):
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        assert timer.sets(2**20) * 2**20 >= 4 * l2_bytes
        assert timer.sets(2**40) == 1

    def test_both_methods_agree_on_a_large_copy(self, timer):
        events, graph = timer.bandwidth("events"), timer.bandwidth("graph")
        assert events == pytest.approx(graph, rel=0.1)

    @pytest.mark.parametrize("method", ["events", "graph", "host"])
    def test_a_backward_pass(self, timer, method):
        x = torch.randn(256, 256, device="cuda", requires_grad=True)
        y = (x @ x).sum()
        measured = timer.time(method, [lambda: torch.autograd.grad(y, x, retain_graph=True)])
        assert 0 < measured.ms_20 <= measured.ms <= measured.ms_80

    def test_peak_bytes(self, timer):
        assert timer.peak_bytes(lambda: torch.empty(2**20, device="cuda")) == 2**22

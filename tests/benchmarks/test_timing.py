"""Percentiles, and the time until a call returns. Device events and graphs need a GPU."""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

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


class FakeDevice:
    """A device with a queue, a host that fills it, and the clocks of both in milliseconds."""

    CYCLES_PER_MS = 1000

    def __init__(self):
        self.host = 0.0
        self.free = 0.0  # when all that is queued is done
        self.captured = None

    def launch(self, ms, host_ms=0.0):
        self.host += host_ms
        if self.captured is not None:
            self.captured += ms
        else:
            self.free = max(self.free, self.host) + ms

    def sleep(self, cycles):
        self.launch(cycles / self.CYCLES_PER_MS)

    def synchronize(self):
        self.host = max(self.host, self.free)

    def perf_counter(self):
        return self.host / 1e3

    def event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)

    @contextmanager
    def capture(self, graph, stream):
        self.captured = 0.0
        yield
        graph.replay = partial(self.launch, self.captured)
        self.captured = None


class FakeEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.launch(0.0)
        self.ms = self.device.free

    def query(self):
        return self.ms <= self.device.host

    def elapsed_time(self, end):
        return end.ms - self.ms


class TestDeviceMethods:
    """What becomes of events, graphs and sleeps, on a device that is made up."""

    @pytest.fixture
    def device(self, monkeypatch):
        device = FakeDevice()
        for name, stand_in in {
            "Event": device.event,
            "CUDAGraph": SimpleNamespace,
            "graph": device.capture,
            "current_stream": lambda: None,
            "synchronize": device.synchronize,
            "_sleep": device.sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        clock = SimpleNamespace(perf_counter=device.perf_counter)
        monkeypatch.setattr(timing, "time", clock)
        return device

    @pytest.mark.parametrize("method", ["events", "graph"])
    @pytest.mark.parametrize("sets", [1, 3])
    def test_time_of_a_call(self, device, method, sets):
        called = []

        def call(i):
            called.append(i)
            device.launch(2.0, host_ms=0.1)

        timer = CudaTimer(5.0)
        measured = timer.time(method, [lambda i=i: call(i) for i in range(sets)])
        assert measured == pytest.approx((2.0, 2.0, 2.0))
        assert set(called) == set(range(sets))
        if method == "graph":  # whole turns
            assert called[-sets:] == list(range(sets))

    @pytest.mark.parametrize("ms, host_ms", [(0.01, 0.4), (0.3, 0.4), (5.0, 0.4)])
    def test_events_leave_out_the_host(self, device, ms, host_ms):
        def call():
            device.launch(ms / 2, host_ms / 2)
            device.launch(ms / 2, host_ms / 2)

        measured = CudaTimer(20.0).time("events", [call])
        assert measured == pytest.approx((ms, ms, ms))

    def test_a_group_during_which_the_host_stumbled_is_measured_again(self, device):
        calls = []

        def call():
            calls.append(1)
            device.launch(0.1, host_ms=50.0 if len(calls) % 35 == 0 else 0.3)

        timer = CudaTimer(30.0)
        times = timer._queued_times([call], 100, 3.0)
        assert times == pytest.approx([0.1] * 100)
        assert len(calls) > 100

    def test_the_sleep_grows_until_it_is_long_enough(self, device):
        timer = CudaTimer()
        timer._cycles_per_ms = device.CYCLES_PER_MS / 6  # the clock was slow when it was read
        times = timer._queued_times([lambda: device.launch(0.1, host_ms=0.3)], 10, 3.0)
        assert times == pytest.approx([0.1] * 10)

    def test_a_call_that_waits_for_the_device_has_no_time(self, device):
        def call():
            device.launch(0.1, host_ms=0.1)
            device.synchronize()

        with pytest.raises(RuntimeError, match="do they wait for the device"):
            CudaTimer(5.0).time("events", [call])

    @pytest.mark.parametrize("method", ["events", "graph"])
    def test_bandwidth(self, device, method, monkeypatch):
        class Copy:
            def copy_(self, x):
                device.launch(6.0, host_ms=0.1)

        def faster(x, out):
            device.launch(4.0, host_ms=0.1)

        monkeypatch.setattr(timing, "_copy_pair", lambda nbytes, device: (None, Copy()))
        monkeypatch.setattr(torch, "neg", faster)
        monkeypatch.setattr(CudaTimer, "sets", lambda self, nbytes: 1)
        timer = CudaTimer(5.0)
        assert timer.bandwidth(method) == pytest.approx(2 * timing.COPY_BYTES / 4e-3)


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

    def test_events_leave_out_the_host(self, timer):
        x = torch.ones(2**22, device="cuda")

        def slow_to_launch():
            time.sleep(1e-3)
            return x + 1

        alone = timer.time("events", [lambda: x + 1])
        assert timer.time("events", [slow_to_launch]).ms == pytest.approx(alone.ms, rel=0.5)

    def test_peak_bytes(self, timer):
        assert timer.peak_bytes(lambda: torch.empty(2**20, device="cuda")) == 2**22

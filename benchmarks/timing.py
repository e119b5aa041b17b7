"""Measuring on a CUDA device: medians with the 20th and 80th percentiles.

"events" puts a device event before and after each call. Calls queue up behind a kernel that only
waits, so that the device never waits for the host: its time is all that is measured. "graph"
captures several calls in one CUDA graph and divides the time of its replays, so that launching
costs nothing. "host" is the time until the call returns, by the clock of the CPU.

A call whose tensors would stay in the L2 cache goes over several sets of them in turn, and results
are kept as long as the turn lasts, so that reads and writes reach memory. Everything runs on one
side stream, since capturing is not possible on the default one and a backward pass runs on the
stream of its forward pass.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import cycle
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
HOST_CALLS = 1000
COPY_BYTES = 2**30
# Calls that are queued together. Launching blocks once about 1024 launches and events are queued:
# half of that leaves a call 48 launches beside its events.
GROUP = 10
# How often a group is tried again that the device began before all of it was queued.
TRIES = 6
CALIBRATION_CYCLES = 10**7


class Quantiles(NamedTuple):
    """Milliseconds a call."""

    ms: float
    ms_20: float
    ms_80: float


class Timer(Protocol):
    """What `measure` needs: CudaTimer, or a stand-in where nothing is measured."""

    device: str

    def sets(self, nbytes: int) -> int: ...

    def time(self, method: str, calls: Sequence[Call]) -> Quantiles: ...

    def bandwidth(self, method: str) -> float: ...

    def copy(self, method: str, nbytes: int) -> Quantiles: ...

    def peak_bytes(self, call: Call) -> int: ...


def quantiles(times: Sequence[float]) -> Quantiles:
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Quantiles(*torch.tensor(times, dtype=torch.float64).quantile(points).tolist())


def time_host(call: Call, synchronize: Call, count: int = HOST_CALLS) -> Quantiles:
    """The time until `call` returns. The device must be the faster one of the two."""
    times = []
    gc.disable()
    try:
        for i in range(count + count // 10):
            if i % 100 == 0:
                synchronize()  # so that the queue never fills
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e6)
    finally:
        gc.enable()
    return quantiles(times[count // 10 :])


class CudaTimer:
    """Measures each call for about `budget_ms` of device time."""

    device = "cuda"

    def __init__(self, budget_ms: float = 300.0):
        self.budget_ms = budget_ms
        self._bandwidths: dict[str, float] = {}

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Everything from making the tensors to measuring belongs inside."""
        with torch.cuda.stream(torch.cuda.Stream()):
            yield

    def sets(self, nbytes: int) -> int:
        """How many sets of tensors of `nbytes` in all make four times the L2 cache."""
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, math.ceil(4 * l2_bytes / nbytes))

    def time(self, method: str, calls: Sequence[Call]) -> Quantiles:
        """`calls` do the same on different tensors."""
        if method == "host":
            return time_host(calls[0], torch.cuda.synchronize)
        host_ms, estimate = self._warm_up(calls)
        if method == "events":
            return quantiles(self._queued_times(calls, self.count(estimate), GROUP * host_ms))
        # Whole turns, in graphs long enough for an event to resolve.
        per_graph = len(calls) * math.ceil(min(2 / estimate, 50) / len(calls))
        graph = torch.cuda.CUDAGraph()
        kept: deque = deque(maxlen=len(calls))
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for i in range(per_graph):
                kept.append(calls[i % len(calls)]())
        # A replay lasts so much longer than its launch that it needs no other queue.
        count, nothing = self.count(estimate * per_graph), deque(maxlen=0)
        pairs = [bracket(graph.replay, nothing) for _ in range(count)]
        torch.cuda.synchronize()
        return quantiles([t / per_graph for t in elapsed(pairs)])

    def bandwidth(self, method: str) -> float:
        """Bytes read plus written a second by a copy of a GiB, measured once a method."""
        if method not in self._bandwidths:
            copied = self.copy(method, 2 * COPY_BYTES)
            self._bandwidths[method] = 2 * COPY_BYTES / (copied.ms * 1e-3)
        return self._bandwidths[method]

    def copy(self, method: str, nbytes: int) -> Quantiles:
        """The fastest of the ways to copy that read and write `nbytes` together.

        `Tensor.copy_` is, outside a graph; inside, it goes through the copy engine, which is slower
        than a kernel on wide elements.
        """
        pairs = [_copy_pair(nbytes // 2, self.device) for _ in range(self.sets(nbytes))]
        ways = (lambda x, y: y.copy_(x), lambda x, y: torch.neg(x, out=y))
        times = [
            self.time(method, [lambda x=x, y=y, way=way: way(x, y) for x, y in pairs])
            for way in ways
        ]
        return min(times, key=lambda time: time.ms)

    def peak_bytes(self, call: Call) -> int:
        """The most memory that `call` held at a time beyond what was held before it."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def count(self, estimate: float) -> int:
        return int(min(max(self.budget_ms / estimate, 10), 1000))

    def _warm_up(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Compile, fill caches and wake the clocks.

        Returns:
            Milliseconds until a call returns, and until it is done; both roughly.
        """
        for call in calls:
            call()
        torch.cuda.synchronize()
        start, host, count = time.perf_counter(), 0.0, 0
        while count < 3 or time.perf_counter() - start < self.budget_ms / 5e3:
            called = time.perf_counter()
            calls[count % len(calls)]()
            host += time.perf_counter() - called
            torch.cuda.synchronize()
            count += 1
        return host * 1e3 / count, (time.perf_counter() - start) * 1e3 / count

    def _queued_times(self, calls: Sequence[Call], count: int, queue_ms: float) -> list[float]:
        """Of at least `count` calls, in groups that are queued in full before their first begins.

        Args:
            queue_ms: About how long the host takes to queue a group.
        """
        turn, kept = cycle(calls), deque(maxlen=len(calls))
        times: list[float] = []
        sleep_ms, tries = 2 * queue_ms, 0
        while len(times) < count:
            torch.cuda._sleep(math.ceil(sleep_ms * self._cycles_per_ms))
            start = time.perf_counter()
            pairs = [bracket(next(turn), kept) for _ in range(GROUP)]
            late = pairs[0][0].query()  # The sleep was over before all was queued.
            queue_ms = (time.perf_counter() - start) * 1e3
            torch.cuda.synchronize()
            if not late:
                times += elapsed(pairs)
                sleep_ms, tries = 2 * queue_ms, 0
            elif tries < TRIES:
                sleep_ms, tries = 2 * max(queue_ms, sleep_ms), tries + 1
            else:
                raise RuntimeError(
                    "These calls cannot be queued ahead: do they wait for the device?"
                )
        return times

    @cached_property
    def _cycles_per_ms(self) -> float:
        """Of the clock by which `torch.cuda._sleep` counts, once the device is awake."""
        nothing: deque = deque(maxlen=0)
        pairs = [bracket(lambda: torch.cuda._sleep(CALIBRATION_CYCLES), nothing) for _ in range(3)]
        torch.cuda.synchronize()
        # The first one also loads the kernel.
        return CALIBRATION_CYCLES / min(elapsed(pairs))


def make_timer(quick: bool) -> CudaTimer:
    return CudaTimer(60.0 if quick else 300.0)


def bracket(call: Call, kept: deque) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events around the call, whose result goes into `kept`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    kept.append(call())
    end.record()
    return start, end


def elapsed(pairs: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
    return [start.elapsed_time(end) for start, end in pairs]


def _copy_pair(nbytes: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    # Random, since a memory may move a constant faster.
    x = torch.randint(0, 256, (nbytes // 8 * 8,), dtype=torch.uint8, device=device)
    return x.view(torch.int64), torch.empty_like(x).view(torch.int64)

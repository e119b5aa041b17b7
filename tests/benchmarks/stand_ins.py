"""A machine, and a timer that knows the time without measuring it."""

from contextlib import nullcontext

from benchmarks.timing import Quantiles

MACHINE = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "python": "3", "fbila": "0"}


class FakeTimer:
    """Runs every call once and says that it took a millisecond, or what `ms` says by the method."""

    device = "cpu"

    def __init__(self, ms: dict[str, float] | None = None):
        self.ms = ms or {}
        self.calls = 0

    def stream(self):
        return nullcontext()

    def sets(self, nbytes):
        return 2

    def time(self, method, calls):
        for call in calls:
            call()
        self.calls += len(calls)
        ms = self.ms.get(method, 1.0)
        return Quantiles(ms, 0.9 * ms, 1.1 * ms)

    def bandwidth(self, method):
        return 1e9

    def copy(self, method, nbytes):
        return Quantiles(0.5, 0.5, 0.5)

    def peak_bytes(self, call):
        return 4096

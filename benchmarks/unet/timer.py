"""Times of whole steps, as they follow each other in a sampler: launched one after the other.

Unlike an operator, a step cannot be queued ahead behind a waiting kernel: it launches more than the
queue can hold. So where Python is slower than the device, it is Python that is measured; whoever
samples a picture waits for it, too.
"""

import time
from collections import deque

import torch

from ..timing import Call, bracket, elapsed

FEWEST, MOST = 3, 50
# Milliseconds of a call that is warm after its first time: what was new took less than the rest.
_SLOW = 2000.0


class StepTimer:
    """Measures each call for about `budget_ms`, but at least `FEWEST` times.

    On a CPU, which is for trying the benchmark out, it goes by the clock.
    """

    def __init__(self, device: str, budget_ms: float = 3000.0) -> None:
        self.device = device
        self.budget_ms = budget_ms

    def times(self, call: Call) -> list[float]:
        """Milliseconds of each repeat, after warming up."""
        (first,) = self._run(call, 1)
        if first < _SLOW:
            self._run(call, 1)
        (estimate,) = self._run(call, 1)
        return self._run(call, int(min(max(self.budget_ms / estimate, FEWEST), MOST)))

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that `call` held at a time beyond what was held before it."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _run(self, call: Call, count: int) -> list[float]:
        if self.device != "cuda":
            return [_clocked(call) for _ in range(count)]
        nothing: deque = deque(maxlen=0)
        pairs = [bracket(call, nothing) for _ in range(count)]
        torch.cuda.synchronize()
        return elapsed(pairs)


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3

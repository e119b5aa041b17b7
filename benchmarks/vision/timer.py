"""Times of a layer alone, by replaying it as a CUDA graph.

A layer of one stage is over so soon that launching it from Python would be what is measured; in a
whole model, the layers before it run meanwhile. The steps of models are measured as they are.
"""

import math
from collections import deque

import torch

from ..timing import Call, bracket, elapsed
from ..unet.timer import FEWEST, MOST, StepTimer

# Milliseconds that one graph should take at least.
SHORTEST = 2.0


class GraphTimer(StepTimer):
    """A `StepTimer` whose times are those of the device alone; on a CPU there is no difference."""

    def times(self, call: Call) -> list[float]:
        if self.device != "cuda":
            return super().times(call)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            self._run(call, 2)
            (estimate,) = self._run(call, 1)
            calls = math.ceil(min(SHORTEST / estimate, 20))
            graph = torch.cuda.CUDAGraph()
            kept: deque = deque(maxlen=1)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(calls):
                    kept.append(call())
            graph.replay()
            count = int(min(max(self.budget_ms / (calls * estimate), FEWEST), MOST))
            nothing: deque = deque(maxlen=0)
            pairs = [bracket(graph.replay, nothing) for _ in range(count)]
            torch.cuda.synchronize()
        return [ms / calls for ms in elapsed(pairs)]

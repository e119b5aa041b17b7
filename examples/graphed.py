"""Forward and backward replayed from CUDA graphs, where a GPU would wait for Python otherwise.

step = Graphed(forward_and_backward, parameters)
for example in examples:
    losses = step(**example)  # adds to the gradients
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

# Calls with new shapes that run as they are: kernels are compiled and chosen in them.
WARM_UP = 3


class Recorder:
    """Records what a function launches on the GPU; all recordings share their memory."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Calls it on the stream of the recordings, so that both find the same workspaces."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(
        self, function: Callable[[], dict[str, Tensor]]
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """What replays it, and the tensors that each replay writes. Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Meanwhile another thread may make the next batch on the GPU, which is not recorded.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


class Graphed:
    """`step(**example)`, from its fourth call with the same shapes on replayed from a graph.

    Args:
        step: Takes tensors, or dicts of them, calls `backward()` and returns tensors without
            gradients. It may not wait for the GPU; what else it reads must stay where it is.
        parameters: All that get gradients. Those are added to in place, by replays as well, so
            that they are to be set to zero and not to None.
    """

    def __init__(
        self, step: Callable[..., dict[str, Tensor]], parameters: Iterable[nn.Parameter]
    ) -> None:
        self.step, self.recorder = step, Recorder()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.calls: Counter = Counter()
        # Shapes -> inputs, replay and outputs.
        self.recordings: dict[tuple, tuple] = {}

    def __call__(self, **example) -> dict[str, Tensor]:
        shapes = tuple((x.shape, x.dtype) for x in _tensors(example))
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARM_UP:
            return self.recorder.warm_up(lambda: self.step(**example))
        if shapes not in self.recordings:
            inputs = _copies(example)
            self.recordings[shapes] = inputs, *self.recorder.record(lambda: self.step(**inputs))
        inputs, replay, outputs = self.recordings[shapes]
        for own, given in zip(_tensors(inputs), _tensors(example), strict=True):
            own.copy_(given)
        replay()
        # Any other replay may write over them.
        return {name: output.clone() for name, output in outputs.items()}


def _tensors(example: dict) -> Iterator[Tensor]:
    for value in example.values():
        yield from _tensors(value) if isinstance(value, dict) else (value,)


def _copies(example: dict) -> dict:
    return {
        name: _copies(value) if isinstance(value, dict) else value.clone()
        for name, value in example.items()
    }

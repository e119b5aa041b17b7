"""A step of training as a CUDA graph, in which Python has no part."""

import torch

from .timing import Call


def replayed(step: Call) -> Call:
    """A replay of `step`, captured when it is warm, as PyTorch's notes on CUDA graphs have it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay

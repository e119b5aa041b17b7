"""A step of training as a CUDA graph, in which Python has no part."""

import torch

from .timing import Call


class Replay:
    """A replay of `step`, captured when it is warm, as PyTorch's notes on CUDA graphs have it.

    It keeps `step`: a graph works on the memory of parameters and of an optimizer, and holds none.
    """

    def __init__(self, step: Call) -> None:
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()

    def __call__(self) -> object:
        self.graph.replay()
        return self.loss

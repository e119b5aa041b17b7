"""What records for examples/graphed.py where there is no GPU."""

import graphed
import torch


class StandIn:
    """Computes at every replay, from the inputs of a recording, and where all of them write.

    Outputs lie where the next replay of any recording overwrites them, as they may in a graph.
    """

    def __init__(self):
        self.written = {}

    def warm_up(self, function):
        return function()

    def record(self, function):
        def replay():
            for name, output in function().items():
                self.written.setdefault(name, torch.empty_like(output)).copy_(output)

        return replay, self.written


def counting(monkeypatch, kind):
    """Has `Graphed` record by `kind`; returns a list that grows by each recording."""
    recorded = []

    class Counting(kind):
        def record(self, function):
            recorded.append(function)
            return super().record(function)

    monkeypatch.setattr(graphed, "Recorder", Counting)
    return recorded

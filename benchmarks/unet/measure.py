"""One row of UNets: each attention in turns, gated, timed and weighed."""

from ..turns import measure_subject
from .gate import Gate
from .inference import Inference
from .rows import Row
from .timer import StepTimer
from .training import Training


def measure(row: Row, timer: StepTimer, gate: Gate) -> dict:
    """The record of `row`, see `measure_subject`."""
    kind = Training if row.mode.startswith("train") else Inference
    return measure_subject(row, timer, lambda: kind(row, timer.device, gate))

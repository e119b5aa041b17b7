"""The passes of a function as calls to be timed, each set of tensors a call of its own."""

from contextlib import nullcontext

import torch

from .cases import Case
from .eager import Attention
from .floor import pass_bytes
from .operators import make_inputs
from .timing import Call, Quantiles, Timer


def make_call(case: Case, name: str, function: Attention, device: str, seed: int) -> Call:
    """The pass `name` on tensors of its own; its results are what the call returns."""
    q, k, v, do = make_inputs(case, device, seed)
    if name == "forward":
        return lambda: function(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if name == "forward+backward":
        return lambda: torch.autograd.grad(function(*leaves), leaves, do)
    o = function(*leaves)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def time_pass(
    case: Case, name: str, function: Attention, timer: Timer
) -> tuple[Quantiles, int | None]:
    """The time of the pass, and its peak memory beyond what it is given (None for "host")."""
    host = case.method == "host"
    sets = 1 if host else timer.sets(pass_bytes(case, name))
    with torch.no_grad() if name == "forward" else nullcontext():
        calls = [make_call(case, name, function, timer.device, seed) for seed in range(sets)]
        time = timer.time(case.method, calls)
        return time, None if host else timer.peak_bytes(calls[0])

"""The correctness gate: what is wrong has no speed.

The errors of o, dq, dk and dv, max |x - x64| against float64 on the inputs as given, for the first
and the last head. The bound is the budget of docs/numerics.md,

    forward 2 (error of plain PyTorch + eps(dtype) * size)    backward 3 (...)

and at most a share of `size`, the largest value of the result: sums over these random inputs do not
cancel, so its terms are not much larger.
"""

from collections.abc import Callable

import torch

from .eager import Attention

# The largest max|error| / size of forward and backward, whatever plain PyTorch does.
RAILS = {
    "float32": (2e-6, 5e-6),
    "float16": (1e-3, 3e-3),
    "bfloat16": (8e-3, 2e-2),
}
NAMES = ("o", "dq", "dk", "dv")
# A peer only has to compute the same function: |o - o64| / |o64|, by norm.
PEER_ERROR = 5e-2


def check(
    function: Attention, truth: Attention, plain: Attention | None, inputs: list[torch.Tensor]
) -> dict[str, dict]:
    """The error and the bound of each result of `function`, and whether it holds (`ok`).

    Args:
        truth: Computes in the dtype of its inputs; is given float64.
        plain: PyTorch at the dtype of `function`; None leaves the share of `size` alone.
        inputs: q, k, v, do.
    """
    actual = [_ends(x) for x in _results(function, inputs)]
    ends = [_ends(x) for x in inputs]
    exact = _results(truth, [x.double() for x in ends])
    rounded = [None] * 4 if plain is None else _results(plain, ends)
    errors = {}
    for name, x, x64, x_plain in zip(NAMES, actual, exact, rounded, strict=True):
        error, bound = _max_error(x, x64), _bound(name, x.dtype, x64, x_plain)
        # A NaN is within no bound.
        errors[name] = {"error": error, "bound": bound, "ok": error <= bound}
    return errors


def passed(errors: dict[str, dict]) -> bool:
    return all(entry["ok"] for entry in errors.values())


def relative_error(function: Attention, truth: Attention, inputs: list[torch.Tensor]) -> float:
    """|o - o64| / |o64| by norm, on the first and the last head."""
    with torch.no_grad():
        o = _ends(function(*inputs[:3])).double()
        o64 = truth(*(_ends(x).double() for x in inputs[:3]))
        return float((o - o64).norm() / o64.norm())


def _results(function: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]


def _ends(x: torch.Tensor) -> torch.Tensor:
    return x[:, [0, -1]]


def _max_error(x: torch.Tensor, x64: torch.Tensor) -> float:
    return float((x.double() - x64).abs().max())


def _bound(name: str, dtype: torch.dtype, x64: torch.Tensor, x_plain: torch.Tensor | None) -> float:
    backward = name != "o"
    size = float(x64.abs().max())
    rail = RAILS[str(dtype).removeprefix("torch.")][backward] * size
    if x_plain is None:
        return rail
    budget = (3 if backward else 2) * (_max_error(x_plain, x64) + torch.finfo(dtype).eps * size)
    # Where plain PyTorch overflows, the share of `size` alone bounds the error.
    return min(rail, budget) if budget < float("inf") else rail

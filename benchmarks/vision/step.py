"""What a row times: a step of a model as in `benchmarks.hosts`, or a pass of a layer alone.

Every way is held to the official operations in float32, as `benchmarks.hosts.step` says.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..hosts import step as hosts
from ..nearness import precise, relative
from ..timing import Call
from .models import HOSTS
from .rows import WAYS, Row


class _Ways:
    """A row's ways to compute, compiled and not, side by side."""

    hosts = HOSTS
    fullgraph = True

    def ready(self, name: str) -> AbstractContextManager[tuple[Call, dict[str, float]]]:
        way, compile_it = WAYS[name]
        return self._ready(way, compile_it)


class Inference(_Ways, hosts.Inference):
    """In bfloat16."""


class Training(_Ways, hosts.Training):
    """Of a model: float32 weights, bfloat16 autocast, AdamW.

    In the gate BatchNorm is an affine map: by the statistics of one picture, gradients in front of
    it would be next to nothing but rounding, which says nothing about attention. What is compiled
    is held to eager mode with these statistics, and may differ by as much as they make of rounding.
    """

    def _result(self, model: nn.Module, inputs: hosts.Inputs, exactly: bool = False) -> Tensor:
        if not exactly and inputs is self.inputs:
            return super()._result(model, inputs)
        with affine_norms(model):
            return super()._result(model, inputs, exactly)

    def _compiled_bound(self, bound: float) -> float:
        bound = super()._compiled_bound(bound)
        if not _batch_norms(self.model):
            return bound
        if self._rounding is None:
            wide = copy.deepcopy(self.model).float()
            with precise():
                truth = super()._result(wide, self.single, exactly=True)
            self._rounding = relative(super()._result(self.model, self.single), truth)
        return max(bound, 2 * hosts.FACTOR * self._rounding)

    _rounding: float | None = None


class ForwardBackward(_Ways, hosts.Inference):
    """Of a layer in bfloat16: the gradients of its input and its parameters."""

    def _set_up(self) -> None:
        self.model.to(self.dtype).train()
        self._weights: dict[tuple, Tensor] = {}

    def _mode(self) -> torch.enable_grad:
        return torch.enable_grad()

    def _step(self, model: nn.Module) -> Call:
        return lambda: self._gradients(model, self.inputs)

    def _result(self, model: nn.Module, inputs: hosts.Inputs, exactly: bool = False) -> Tensor:
        if exactly:
            inputs = {name: x.float() for name, x in inputs.items()}
        x, *parameters = (g.flatten().float() for g in self._gradients(model, inputs))
        # Each of the two by its norm: sums over all tokens are so much larger.
        return torch.cat([g / g.norm() for g in (x, torch.cat(parameters))])

    def _gradients(self, model: nn.Module, inputs: hosts.Inputs) -> tuple[Tensor, ...]:
        x = inputs["x"].detach().requires_grad_()
        y = self.host.call(model, {"x": x})
        return torch.autograd.grad(y, [x, *model.parameters()], self._weight(y))

    def _weight(self, y: Tensor) -> Tensor:
        """What the answer is weighed by, in its memory order; made at the first call."""
        key = y.shape, y.stride(), y.dtype
        if key not in self._weights:
            generator = torch.Generator(y.device).manual_seed(2)
            drawn = torch.randn(y.shape, generator=generator, device=y.device)
            self._weights[key] = torch.empty_like(y).copy_(drawn)
        return self._weights[key]


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def affine_norms(model: nn.Module) -> Iterator[None]:
    norms = [norm for norm in _batch_norms(model) if norm.training]
    for norm in norms:
        # Steps of training before have changed them, and use them for nothing.
        norm.reset_running_stats()
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def make_step(row: Row, device: str) -> hosts.Inference:
    if row.kind == "inference":
        return Inference(row, device)
    return (Training if row.kind == "training" else ForwardBackward)(row, device)

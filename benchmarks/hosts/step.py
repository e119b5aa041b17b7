"""What a row times: a forward pass in 16 bits, or a step of training under their autocast.

The gate: before it is timed, a way is compared with the same function by PyTorch's own operations
in float32, on one picture. It may err by 1.5 times as much as those operations do in 16 bits: in
the answer, and in training in all gradients together; in each parameter's by four times as much,
and 0.03. Where they are wrong themselves, the host has a bound, and their time is taken none the
less. Pictures too large for that in reasonable time are compared with the same function in 16
bits, and smaller ones in float32. What is compiled may differ from the same model in eager mode, on
the whole batch, by twice the bound.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..nearness import precise, relative, require
from ..replay import Replay
from ..timing import Call
from .models import HOSTS
from .rows import Row

FACTOR = 1.5
# Of one parameter's gradient: this many times what PyTorch's operations err by, and this more; not
# where they err by so much.
ONE, LEAST, NOISE = 4.0, 0.03, 0.3
# What torch.compile is told beside that shapes stay as they are.
COMPILE: dict[str, object] = {}

Inputs = Mapping[str, Tensor]


class Inference:
    """A row's model in 16 bits and one batch."""

    missing = None
    hosts = HOSTS
    # Whether a model that is compiled must be one graph.
    fullgraph = False

    def __init__(self, row: Row, device: str) -> None:
        self.row, self.host = row, self.hosts[row.host]
        self.dtype: torch.dtype = getattr(torch, row.dtype)
        torch.manual_seed(0)
        with torch.device(device):
            self.model = self.host.make(row.px)
        self._set_up()
        self.inputs = self._inputs(row.px, row.batch, device)
        self.exact_px = min(row.px, self.host.exact_px or row.px)
        self.single = self._inputs(self.exact_px, 1, device)
        self._exact: dict[str, tuple[Tensor, float]] = {}

    def ready(self, name: str) -> AbstractContextManager[tuple[Call, dict[str, float]]]:
        """A step with this attention, and its errors; raises `Wrong` where they are too large."""
        return self._ready(name, self.row.mode == "compiled")

    @contextmanager
    def _ready(self, name: str, compile_it: bool) -> Iterator[tuple[Call, dict[str, float]]]:
        errors = self._check(name)
        with self._mode(), self.host.ways[name](self.model):
            if not compile_it:
                yield self._step(self.model), errors
                return
            options = {"dynamic": False, "fullgraph": self.fullgraph, **COMPILE}
            compiled = torch.compile(self.model, **options)
            eager = self._result(self.model, self.inputs)
            # Others that compile beside it have the memory meanwhile.
            torch.cuda.empty_cache()
            errors["eager"] = relative(self._result(compiled, self.inputs), eager)
            bound = self._compiled_bound(errors["float32_bound"])
            require("difference from eager mode", errors["eager"], bound)
            yield self._step(compiled), errors

    def _compiled_bound(self, bound: float) -> float:
        return 2 * bound

    def _set_up(self) -> None:
        self.model.to(self.dtype).eval().requires_grad_(False)

    def _mode(self) -> torch.no_grad | nullcontext:
        return torch.no_grad()

    def _step(self, model: nn.Module) -> Call:
        return partial(self.host.call, model, self.inputs)

    def _result(self, model: nn.Module, inputs: Inputs, exactly: bool = False) -> Tensor:
        """What is compared."""
        if exactly:
            inputs = {name: x.float() for name, x in inputs.items()}
        return self.host.call(model, inputs)

    def _check(self, name: str) -> dict[str, float]:
        same = self.host.same[name]
        truth, plain = self._truth(same)
        error, bound = relative(self._of(name), truth), self.host.largest
        if bound is None:
            bound = FACTOR * plain
        elif name == same:
            return {"float32": error}
        require("error against float32", error, bound)
        errors = {"float32": error, "float32_bound": bound}
        if name != same and self.exact_px < self.row.px:
            errors["16_bits"] = relative(self._of(name, self.inputs), self._of(same, self.inputs))
            require("difference in 16 bits", errors["16_bits"], bound + plain)
        return errors

    def _truth(self, name: str) -> tuple[Tensor, float]:
        """What PyTorch's operations give in float32, and how far they are from it in 16 bits."""
        if name not in self._exact:
            wide = copy.deepcopy(self.model).float()
            with self._mode(), self.host.ways[name](wide), precise():
                truth = self._result(wide, self.single, exactly=True)
            self._exact[name] = truth, relative(self._of(name), truth)
        return self._exact[name]

    def _of(self, name: str, inputs: Inputs | None = None) -> Tensor:
        with self._mode(), self.host.ways[name](self.model):
            return self._result(self.model, inputs or self.single)

    def _inputs(self, px: int, batch: int, device: str) -> Inputs:
        drawn = self.host.draw(px, batch, torch.Generator(device).manual_seed(1))
        return {name: x.to(self.dtype) for name, x in drawn.items()}


class Training(Inference):
    """A row's model in float32; the loss is a mean square, and AdamW trains all of it."""

    def _set_up(self) -> None:
        self.model.train()
        self.captured = self.row.mode == "graph" and next(self.model.parameters()).is_cuda

    def _mode(self) -> torch.no_grad | nullcontext:
        return nullcontext()

    def _step(self, model: nn.Module) -> Call:
        parameters = list(self.model.parameters())
        fused = parameters[0].is_cuda
        # It takes as long with a rate of 0, and every turn starts from the same weights.
        optimizer = torch.optim.AdamW(
            parameters, lr=0.0, weight_decay=0.05, fused=fused, capturable=self.captured
        )

        def step() -> Tensor:
            loss = self._loss(model, self.inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Replay(step) if self.captured else step

    def _loss(self, model: nn.Module, inputs: Inputs, half: bool = True) -> Tensor:
        device = next(iter(inputs.values())).device.type
        # What autocast keeps for the next use would not be there in a replay.
        options = {"enabled": half, "cache_enabled": not self.captured}
        with torch.autocast(device, self.dtype, **options):
            answer = self.host.call(model, inputs).float()
        # Not of the answer alone, whose gradient would vanish with it.
        wanted = torch.linspace(-1, 1, answer.shape[-1], device=answer.device)
        return (answer - wanted).square().mean()

    def _check(self, name: str) -> dict[str, float]:
        errors = super()._check(name)
        same = self.host.same[name]
        if name != same:
            errors["parameter"] = self._worst_parameter(name, same)
        return errors

    def _worst_parameter(self, name: str, same: str) -> float:
        """The largest error of one parameter's gradient, which may be lost among all of them."""
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad]
        gradients = (self._of(name), self._of(same), self._truth(same)[0])
        worst = 0.0
        for x, plain, truth in zip(*(each.split(sizes) for each in gradients), strict=True):
            bound = relative(plain, truth)
            # Where 16 bits are all rounding they tell nothing.
            if bound < NOISE:
                error = relative(x, truth)
                require("error of a parameter's gradient", error, ONE * bound + LEAST)
                worst = max(worst, error)
        return worst

    def _result(self, model: nn.Module, inputs: Inputs, exactly: bool = False) -> Tensor:
        loss = self._loss(model, inputs, half=not exactly)
        used = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, used)])

    def _inputs(self, px: int, batch: int, device: str) -> Inputs:
        return {name: x.float() for name, x in super()._inputs(px, batch, device).items()}


def make_step(row: Row, device: str) -> Inference:
    return (Training if row.kind == "training" else Inference)(row, device)

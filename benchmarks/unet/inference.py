"""A denoising step in float16: the UNet's forward pass, eager or compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..timing import Call
from ..upkeep import first_line, free
from .attentions import Attentions
from .gate import TOLERANCE, Gate, relative, require
from .models import UNETS, make_inputs, make_unet
from .rows import Row

DTYPE = torch.float16
# What torch.compile is told beside that shapes stay as they are.
COMPILE: dict[str, dict] = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}


class Inference:
    """A row's UNet, its inputs, and the official layer's eager output to compare with.

    Attributes:
        reference: None where the official layer fails, as it may for want of memory; fbila is then
            compared with it at the gate's size alone.
        missing: Why there is no reference.
    """

    missing: str | None = None

    def __init__(self, row: Row, device: str, gate: Gate) -> None:
        self.row, self.gate = row, gate
        unet = make_unet(row.unet, device, DTYPE)
        self.inputs = make_inputs(row.unet, row.px, row.batch, device, DTYPE)
        if row.mode != "eager":
            unet.to(memory_format=torch.channels_last)
            sample = self.inputs["sample"]
            self.inputs["sample"] = sample.contiguous(memory_format=torch.channels_last)
        self.attentions = Attentions(unet, UNETS[row.unet].mid_dim_scale)
        self.reference = self._official_output()

    @contextmanager
    def ready(self, name: str) -> Iterator[tuple[Call, dict[str, float]]]:
        """A step with this attention, and its errors; raises `Wrong` where they are too large."""
        softmax = name == "sdpa"
        errors = {} if softmax else self.gate.check(self.row.unet, name, self.attentions)
        with torch.no_grad(), self.attentions.put_in(name):
            call = self._call()
            if not softmax and self.reference is not None:
                errors["official"] = relative(call(), self.reference)
                require("difference from the official layer", errors["official"], TOLERANCE)
            yield call, errors

    def _call(self) -> Call:
        unet: nn.Module = self.attentions.unet
        if self.row.mode == "eager":
            return partial(self._step, unet)
        compiled = torch.compile(unet, dynamic=False, **COMPILE[self.row.mode])
        if self.row.mode == "default":
            return partial(self._step, compiled)

        def replayed() -> Tensor:
            # The output of the last step may be written over.
            torch.compiler.cudagraph_mark_step_begin()
            return self._step(compiled)

        return replayed

    def _step(self, unet: Callable) -> Tensor:
        return unet(**self.inputs, return_dict=False)[0]

    @torch.no_grad()
    def _official_output(self) -> Tensor | None:
        try:
            with self.attentions.put_in("official"):
                return self._step(self.attentions.unet)
        except Exception as error:
            self.missing = first_line(error)
        free()
        return None

"""The correctness gate: what computes something else than the official layer has no time.

Errors are by norm, |x - y| / |y|, of the UNet's output or of all gradients together.
"""

import copy

import torch
from torch import Tensor

from ..nearness import precise, relative, require
from .attentions import Attentions
from .models import UNETS, make_inputs

# Of two float16 runs of one UNet, at the size of the row. Each is about 2e-3 from the exact output
# of SD 1.5 or nearer; with these weights no mistake that was tried stays below 3e-2.
TOLERANCE = 2e-2
# How much farther from a float32 run fbila may be than the official layer is.
FACTOR = 1.5


class Gate:
    """Holds every attention to the official layer's distance from float32, once for each UNet."""

    def __init__(self) -> None:
        self._exact: dict[str, Tensor] = {}
        self._errors: dict[tuple[str, str], float] = {}

    def check(self, unet: str, name: str, attentions: Attentions) -> dict[str, float]:
        """The error of `name` against float32, and its bound; raises `Wrong` beyond that.

        At the UNet's smallest size, in eager mode; outside of `attentions.put_in`.
        """
        official = self._error(unet, "official", attentions)
        require("error of the official layer against float32", official, TOLERANCE)
        error = self._error(unet, name, attentions)
        require("error against float32", error, FACTOR * official)
        return {"float32": error, "float32_bound": FACTOR * official}

    @torch.no_grad()
    def _error(self, unet: str, name: str, attentions: Attentions) -> float:
        if (unet, name) not in self._errors:
            if unet not in self._exact:
                self._exact[unet] = _exact(unet, attentions)
            with attentions.put_in(name):
                actual = run_once(unet, attentions.unet)
            self._errors[unet, name] = relative(actual, self._exact[unet])
        return self._errors[unet, name]


def _exact(name: str, attentions: Attentions) -> Tensor:
    """The output of a float32 copy with the official layer."""
    with attentions.put_in("official"), precise():
        return run_once(name, copy.deepcopy(attentions.unet).float())


def run_once(name: str, unet: torch.nn.Module) -> Tensor:
    weight = next(unet.parameters())
    inputs = make_inputs(name, UNETS[name].gate_px, 2, weight.device.type, torch.float16)
    return unet(**_in_dtype(inputs, weight.dtype), return_dict=False)[0]


def _in_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    """The same numbers, whatever the dtype."""

    def convert(x: Tensor | dict) -> Tensor | dict:
        if isinstance(x, dict):
            return _in_dtype(x, dtype)
        return x.to(dtype) if x.is_floating_point() else x

    return {key: convert(x) for key, x in inputs.items()}

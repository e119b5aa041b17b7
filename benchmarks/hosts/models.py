"""The models: how one is made and called, and the ways to compute its attention.

To add one, add a `Host` to `HOSTS` and rows of it to `rows.ROWS`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backbones

Way = Callable[[nn.Module], AbstractContextManager]
Draw = Callable[[int, int, torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Host:
    """A model of another library.

    Attributes:
        title: Its name, for people.
        make: The model for pictures of so many pixels along each side, in float32, on the default
            device, with random weights under which attention matters.
        draw: Its arguments for (pixels, batch, generator), in float32.
        ways: Name -> what puts this way of computing attention into the model for a block.
        same: Way that is timed -> the way, maybe itself, that computes the same function by
            PyTorch's own operations.
        call: The model's answer, one tensor.
    """

    title: str
    make: Callable[[int], nn.Module]
    draw: Draw
    ways: Mapping[str, Way]
    same: Mapping[str, str]
    call: Callable[[nn.Module, Mapping[str, Any]], Tensor] = lambda model, inputs: model(**inputs)


_BACKBONE: dict[str, Any] = {
    "draw": backbones.draw,
    "ways": {
        "softmax": lambda model: nullcontext(),
        "linear": backbones.linear,
        "eager linear": backbones.eager_linear,
    },
    "same": {"softmax": "softmax", "linear": "eager linear"},
}

HOSTS = {
    "vit_base_patch16": Host("ViT-B/16", backbones.vit_base, **_BACKBONE),
    # For trying the benchmark out on a CPU.
    "tiny": Host("a tiny ViT", backbones.tiny, **_BACKBONE),
}

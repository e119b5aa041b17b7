"""The official operations in the place of fbila's, with the same parameters, for a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from fbila import layers
from fbila.layers.depthwise_conv import DepthwiseConv2d
from fbila.layers.layer_norm import LayerNorm
from fbila.layers.linear import Linear
from fbila.layers.pointwise_conv import PointwiseConv2d
from fbila.models.conv_tokens import ConvStem
from fbila.models.mlla import Gate
from fbila.models.ravlt import RAVLTStem
from fbila.models.window_block import WindowAttention

from . import official_pictures as pictures
from . import official_tokens as tokens


def convolution(
    self: nn.Conv2d,
    x: Tensor,
    addend: Tensor | None = None,
    gate: Tensor | None = None,
    residual: bool = False,
    gelu: bool = False,
    silu: bool = False,
) -> Tensor:
    x = F.gelu(x) if gelu else x
    y = nn.Conv2d.forward(self, x)
    y = x + y if residual else y
    y = y if addend is None else addend + y
    y = F.silu(y) if silu else y
    return y if gate is None else y * gate


def linear(self: nn.Linear, x: Tensor, gelu: bool = False) -> Tensor:
    return nn.Linear.forward(self, F.gelu(x) if gelu else x)


def gate(self: Gate, x: Tensor, g: Tensor) -> Tensor:
    return x * F.silu(g)


def conv_stem(self: ConvStem, x: Tensor) -> Tensor:
    x = self.conv1(x)
    return self.conv3(self.conv2(x) + x).permute(0, 2, 3, 1).contiguous()


def ravlt_stem(self: RAVLTStem, x: Tensor) -> Tensor:
    return self.proj(x).permute(0, 2, 3, 1).contiguous()


# What the models have in place of PyTorch's own modules.
MODULES = {
    DepthwiseConv2d: convolution,
    Gate: gate,
    LayerNorm: nn.LayerNorm.forward,
    Linear: linear,
    PointwiseConv2d: nn.Conv2d.forward,
    # In NCHW.
    ConvStem: conv_stem,
    RAVLTStem: ravlt_stem,
    WindowAttention: tokens.windows,
}
OFFICIAL = {
    layers.FocusedLinearAttention: tokens.focused,
    layers.InLineAttention: tokens.inline,
    layers.LiteMLA: pictures.lite_mla,
    layers.MALA: pictures.mala,
    layers.MLLALinearAttention: tokens.mlla,
    layers.NonCausalSSD: tokens.ssd,
    layers.PolaLinearAttention: tokens.pola,
    layers.PolaPPAttention: tokens.pola_pp,
    layers.RALA: pictures.rala,
    layers.SanaLinearAttention: tokens.sana,
}


@contextmanager
def official(model: nn.Module) -> Iterator[None]:
    """Every layer of these classes computes as its official code does.

    The classes are changed and not the modules, so that a compiler sees methods like any others.
    """
    kinds = {type(module) for module in model.modules()}
    if not kinds & OFFICIAL.keys():
        raise ValueError(f"{type(model).__name__} has none of the layers of fbila.")
    forwards = OFFICIAL | MODULES
    used = kinds & forwards.keys()
    before = {kind: kind.__dict__.get("forward") for kind in used}
    try:
        for kind in used:
            kind.forward = forwards[kind]
        yield
    finally:
        for kind, forward in before.items():
            if forward is None:
                del kind.forward
            else:
                kind.forward = forward

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
from . import linear_models as linear

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
        largest: The largest error of a way that stands for another, where what that gives in 16
            bits is wrong and tells nothing; only eager.
        exact_px: The largest pictures that are compared in float32, where larger ones take minutes.
    """

    title: str
    make: Callable[[int], nn.Module]
    draw: Draw
    ways: Mapping[str, Way]
    same: Mapping[str, str]
    call: Callable[[nn.Module, Mapping[str, Any]], Tensor] = lambda model, inputs: model(**inputs)
    largest: float | None = None
    exact_px: int | None = None


_BACKBONE: dict[str, Any] = {
    "draw": backbones.draw,
    "ways": {
        "softmax": lambda model: nullcontext(),
        "linear": backbones.linear,
        "eager linear": backbones.eager_linear,
    },
    "same": {"softmax": "softmax", "linear": "eager linear"},
}

_LINEAR: dict[str, Any] = {
    "ways": {"stock": lambda model: nullcontext(), "accelerated": linear.accelerated},
    "same": {"stock": "stock", "accelerated": "stock"},
}
# How fast a module could be whose attention took no time.
_PROJECTED: dict[str, Any] = {
    "ways": {**_LINEAR["ways"], "projections": linear.projections_alone},
    "same": {**_LINEAR["same"], "projections": "projections"},
}
_SANA = {**_LINEAR, "call": linear.call_transformer}
# In float16 stock's denominators are infinite for long videos, and its attention 0; or 0 where no
# channel of a query is positive, and its attention NaN.
_SANA_VIDEO = {**_SANA, "largest": 0.02}
# A level of 4096 pixels has more elements than cuDNN counts in 32 bits.
_DC_AE = {**_LINEAR, "call": linear.call_decoder, "exact_px": 2048}

HOSTS = {
    "vit_base_patch16": Host("ViT-B/16", backbones.vit_base, **_BACKBONE),
    # For trying the benchmark out on a CPU.
    "tiny": Host("a tiny ViT", backbones.tiny, **_BACKBONE),
    "sana_1600m": Host("Sana 1.6B", linear.sana, linear.draw_sana, **_SANA),
    "sana_attention": Host(
        "Sana's attention", linear.sana_attention, linear.draw_sana_tokens, **_PROJECTED
    ),
    "sana_video_2b": Host("SanaVideo 2B", linear.sana_video, linear.draw_sana_video, **_SANA_VIDEO),
    "sana_video_attention": Host(
        "SanaVideo's attention",
        linear.sana_video_attention,
        linear.draw_video_tokens,
        **{**_PROJECTED, "call": linear.call_rotated, "largest": _SANA_VIDEO["largest"]},
    ),
    "dc_ae_f32": Host("DC-AE-f32, decoding", linear.dc_ae, linear.draw_latents, **_DC_AE),
    "dc_ae_attention": Host(
        "DC-AE's attention",
        linear.dc_ae_attention,
        linear.draw_dc_ae_level,
        **_LINEAR,
    ),
    "efficientvit_l2": Host("EfficientViT-L2", linear.efficientvit, backbones.draw, **_LINEAR),
    "lite_mla": Host("LiteMLA", linear.lite_mla, linear.draw_lite_mla_level, **_LINEAR),
    "tiny_sana": Host("a tiny Sana", linear.tiny_sana, linear.draw_tiny_sana, **_SANA),
    "tiny_sana_video": Host(
        "a tiny SanaVideo", linear.tiny_sana_video, linear.draw_tiny_video, **_SANA_VIDEO
    ),
    "tiny_dc_ae": Host("a tiny DC-AE", linear.tiny_dc_ae, linear.draw_tiny_latents, **_DC_AE),
    "tiny_efficientvit": Host(
        "a tiny EfficientViT", linear.tiny_efficientvit, backbones.draw, **_LINEAR
    ),
}

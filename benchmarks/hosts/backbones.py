"""timm's vision transformers, with softmax and with linear attention by the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fbila import linear_attn
from fbila.adapters.timm import rope, swap

# timm draws weights under which attention is next to uniform: then hardly any mistake in it shows.
GAIN = 4.0


def vit_base(px: int) -> nn.Module:
    return _drawn(timm.create_model("vit_base_patch16_224", img_size=px))


def tiny(px: int) -> nn.Module:
    settings = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return _drawn(VisionTransformer(img_size=px, **settings))


def draw(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, px, px, generator=generator, device=generator.device)}


@contextmanager
def linear(model: nn.Module) -> Iterator[None]:
    with swap(model):
        yield


@contextmanager
def eager_linear(model: nn.Module) -> Iterator[None]:
    """The same by PyTorch's own operations."""
    kernels = rope.linear_attn
    rope.linear_attn = partial(linear_attn, impl="reference")
    try:
        with swap(model):
            yield
    finally:
        rope.linear_attn = kernels


@torch.no_grad()
def _drawn(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.qkv.weight", "attn.proj.weight")):
            parameter.mul_(GAIN)
    return model

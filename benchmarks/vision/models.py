"""The models and layers: how each is made and called.

Layers are as in the first stage of a published model, or of the size of one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fbila import layers

from ..hosts.models import Host
from .official import OFFICIAL, official

# Under weights as they are drawn attention is next to uniform: then hardly any mistake shows.
GAIN = 4.0
# What makes queries and keys in the layers of fbila.
PROJECTIONS = ("qkv", "qk", "q", "kv", "qkvg", "qg", "qkvo", "in_proj")

_WAYS: dict[str, Any] = {
    "ways": {"eager": official, "fbila": lambda model: nullcontext()},
    "same": {"eager": "eager", "fbila": "eager"},
}


def draw_pictures(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, px, px, generator=generator, device=generator.device)}


def draw_tokens(dim: int, side: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (batch, side * side, dim)
    return {"x": torch.randn(shape, generator=generator, device=generator.device)}


def draw_grid(dim: int, side: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens as a picture: in channels_last, as models over tokens hand them on."""
    x = draw_tokens(dim, side, batch, generator)["x"]
    return {"x": x.unflatten(1, (side, side)).permute(0, 3, 1, 2)}


def draw_nchw(dim: int, side: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": draw_grid(dim, side, batch, generator)["x"].contiguous()}


def of_timm(name: str, px: int) -> nn.Module:
    import fbila.models  # noqa: F401  registers the names

    sized = {"img_size": px} if "swin" in name else {}
    return drawn(timm.create_model(name, **sized))


def tiny(px: int) -> nn.Module:
    """A ViT of focused linear attention."""
    from fbila.adapters.timm import swap

    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    plain = {"class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", img_size=px, **sizes, **plain)
    swap(model, layers.FocusedLinearAttention)
    return drawn(model)


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) in OFFICIAL:
            for name in PROJECTIONS:
                for parameter in getattr(module, name, nn.Identity()).parameters():
                    parameter.mul_(GAIN if parameter.dim() > 1 else 1)
            if hasattr(module, "positional_encoding"):
                nn.init.normal_(module.positional_encoding, std=0.1)
    return model


def _model(title: str, name: str) -> Host:
    return Host(title, partial(of_timm, name), draw_pictures, **_WAYS)


def _layer(title: str, make: Callable[[int], nn.Module], draw: Callable, dim: int) -> Host:
    return Host(title, lambda side: drawn(make(side)), partial(draw, dim), **_WAYS)


def _layers(dim: int, small: int = 1) -> dict[str, Host]:
    """dim: Channels of MLLA's first stage, of which others have multiples; small: divides them."""
    swin, d = 3 * dim // 2, 32 // small
    published = {
        "focused": (
            "FLatten-Swin-T's",
            lambda side: layers.FocusedLinearAttention(swin, swin // d, True, grid_size=side),
            draw_tokens, swin,
        ),
        "polaformer": (
            "PolaFormer-Swin-T's",
            lambda side: layers.PolaLinearAttention(swin, swin // d, True, grid_size=side),
            draw_tokens, swin,
        ),
        "polaformer_pp": (
            "PolaFormer++'s", lambda _: layers.PolaPPAttention(dim, dim // d), draw_tokens, dim
        ),
        "inline": (
            "InLine-Swin-T's",
            lambda _: layers.InLineAttention(swin, swin // d, True),
            draw_tokens, swin,
        ),
        "mlla": ("MLLA-T's", lambda _: layers.MLLALinearAttention(dim, dim // d), draw_tokens, dim),
        "rala": ("RAVLT-S's", lambda _: layers.RALA(dim, 1), draw_grid, dim),
        "mala": ("MAViT-S's", lambda _: layers.MALA(dim, 1), draw_grid, dim),
        "vssd": (
            "VSSD-T's",
            lambda _: layers.NonCausalSSD(dim, 2, d_state=64 // small),
            draw_tokens, dim,
        ),
        "sana": (
            "SANA's", lambda _: layers.SanaLinearAttention(4 * dim, 4 * dim // d), draw_tokens,
            4 * dim,
        ),
        "lite_mla": (
            "EfficientViT-L2's", lambda _: layers.LiteMLA(2 * dim, dim=d), draw_nchw, 2 * dim
        ),
    }  # fmt: skip
    return {name: _layer(*given) for name, given in published.items()}


HOSTS = {
    "mlla_tiny": _model("MLLA-T", "mlla_tiny"),
    "flatten_swin_tiny": _model("FLatten-Swin-T", "flatten_swin_tiny"),
    "ravlt_small": _model("RAVLT-S", "ravlt_small"),
    "polaformer_swin_tiny": _model("PolaFormer-Swin-T", "polaformer_swin_tiny"),
    **_layers(64),
    # For trying the benchmark out on a CPU.
    "tiny": Host("a tiny ViT", tiny, draw_pictures, **_WAYS),
    **{f"tiny_{name}": host for name, host in _layers(16, 4).items()},
}

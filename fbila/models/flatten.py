"""FLatten-PVT and FLatten-Swin: backbones of focused linear attention.

Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023,
https://arxiv.org/abs/2308.00442; LeapLabTHU/FLatten-Transformer.
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..layers import FocusedLinearAttention
from .default_cfg import imagenet_cfg
from .pvt import PyramidVisionTransformer, create_pvt
from .swin import SWIN_BASE, SwinTransformer, create_swin

_cfg = partial(
    imagenet_cfg,
    origin_url="https://github.com/LeapLabTHU/FLatten-Transformer",
    paper_ids="arXiv:2308.00442",
)
_pvt = partial(_cfg, first_conv="patch_embed1.proj")
_swin = partial(_cfg, first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs(
    {
        "flatten_pvt_tiny": _pvt(),
        "flatten_pvt_small": _pvt(),
        "flatten_swin_tiny": _swin(),
        "flatten_swin_small": _swin(),
        "flatten_swin_base": _swin(),
        "flatten_swin_base_384": _swin(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)


@register_model
def flatten_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-T: 12.2M parameters, 2.0G FLOPs."""
    return create_pvt("flatten_pvt_tiny", pretrained, FocusedLinearAttention, **kwargs)


@register_model
def flatten_pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """FLatten-PVT-S: 21.7M parameters, 4.0G FLOPs."""
    options = {"depths": (3, 4, 6, 3), **kwargs}
    return create_pvt("flatten_pvt_small", pretrained, FocusedLinearAttention, **options)


@register_model
def flatten_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-T: 29M parameters, 4.5G FLOPs."""
    return create_swin("flatten_swin_tiny", pretrained, FocusedLinearAttention, **kwargs)


@register_model
def flatten_swin_small(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-S: 51M parameters, 8.7G FLOPs."""
    options = {"depths": (2, 2, 18, 2), **kwargs}
    return create_swin("flatten_swin_small", pretrained, FocusedLinearAttention, **options)


@register_model
def flatten_swin_base(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-B: 89M parameters, 15.4G FLOPs."""
    options = {**SWIN_BASE, **kwargs}
    return create_swin("flatten_swin_base", pretrained, FocusedLinearAttention, **options)


@register_model
def flatten_swin_base_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """FLatten-Swin-B at 384 x 384: 91M parameters, 46.5G FLOPs."""
    options = {**SWIN_BASE, "img_size": 384, "window_size": 12, **kwargs}
    return create_swin("flatten_swin_base_384", pretrained, FocusedLinearAttention, **options)

"""PolaFormer-PVT and PolaFormer-Swin: backbones of polarity-aware linear attention.

Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025,
https://arxiv.org/abs/2501.15061; ZacharyMeng/PolaFormer.
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..layers import PolaLinearAttention
from .default_cfg import imagenet_cfg
from .pvt import PyramidVisionTransformer, create_pvt
from .swin import SWIN_BASE, SwinTransformer, create_swin

_cfg = partial(
    imagenet_cfg,
    origin_url="https://github.com/ZacharyMeng/PolaFormer",
    paper_ids="arXiv:2501.15061",
)
_pvt = partial(_cfg, first_conv="patch_embed1.proj")
_swin = partial(_cfg, first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs(
    {
        "polaformer_pvt_tiny": _pvt(),
        "polaformer_pvt_small": _pvt(),
        "polaformer_swin_tiny": _swin(),
        "polaformer_swin_small": _swin(),
        "polaformer_swin_base": _swin(),
        "polaformer_swin_base_384": _swin(
            input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)


@register_model
def polaformer_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PolaFormer-PVT-T: 12.2M parameters, 2.0G FLOPs."""
    return create_pvt("polaformer_pvt_tiny", pretrained, PolaLinearAttention, **kwargs)


@register_model
def polaformer_pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PolaFormer-PVT-S: 21.7M parameters, 4.0G FLOPs."""
    options = {"depths": (3, 4, 6, 3), **kwargs}
    return create_pvt("polaformer_pvt_small", pretrained, PolaLinearAttention, **options)


@register_model
def polaformer_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """PolaFormer-Swin-T: 29M parameters, 4.5G FLOPs."""
    return create_swin("polaformer_swin_tiny", pretrained, PolaLinearAttention, **kwargs)


@register_model
def polaformer_swin_small(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """PolaFormer-Swin-S: 51M parameters, 8.7G FLOPs."""
    options = {"depths": (2, 2, 18, 2), **kwargs}
    return create_swin("polaformer_swin_small", pretrained, PolaLinearAttention, **options)


@register_model
def polaformer_swin_base(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """PolaFormer-Swin-B: 89M parameters, 15.4G FLOPs."""
    options = {**SWIN_BASE, **kwargs}
    return create_swin("polaformer_swin_base", pretrained, PolaLinearAttention, **options)


@register_model
def polaformer_swin_base_384(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """PolaFormer-Swin-B at 384 x 384: 91M parameters, 46.5G FLOPs."""
    options = {**SWIN_BASE, "img_size": 384, "window_size": 12, **kwargs}
    return create_swin("polaformer_swin_base_384", pretrained, PolaLinearAttention, **options)

"""VSSD: a backbone of non-causal state space duality, with softmax attention in the last stage.

The mixers are `fbila.layers.NonCausalSSD` and `SoftmaxAttention`; all around them is as in MLLA.
Shi et al., "VSSD: Vision Mamba with Non-Causal State Space Duality", 2024,
https://arxiv.org/abs/2407.18559; YuHengsss/VSSD.

State dicts are those of the official releases.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from ..layers import NonCausalSSD
from ..layers.linear import Linear
from .casting import paths
from .conv_tokens import TokenBackbone, TokenBlock
from .default_cfg import imagenet_cfg
from .stages import create_staged

# FX cannot follow what it does with sizes.
register_notrace_module(NonCausalSSD)


class SoftmaxAttention(nn.Module):
    """The attention of the last stage, `(B, N, C)` to the same shape, with the official names."""

    def __init__(self, dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = Linear(dim, 3 * dim, bias=False, **factory)
        self.to_out = Linear(dim, dim, **factory)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """Mixes the tokens; rows and columns are as good as any others to it."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class VSSDBlock(TokenBlock):
    """One block, `(B, H, W, C)` to the same shape, around a mixer of `(B, N, C)`."""

    # Of in_proj the mixer makes one with rows of zeros.
    maps = paths("attn.out_proj", "attn.to_qkv", "attn.to_out", "mlp.fc1", "mlp.fc2")

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(dim, mlp_ratio, proj_drop, drop_path, **factory)
        self.attn = attn

    def mix(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        return self.attn(x.flatten(1, 2), H, W).unflatten(1, (H, W))


class VSSD(TokenBackbone):
    """The backbone, from `(B, in_chans, H, W)` of any H and W to `(B, num_classes)`.

    Args:
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for pooled features.
        global_pool: As in timm.
        embed_dim: Channels of the first stage, doubled from each stage to the next.
        depths: Blocks of each stage; those of the last one have softmax attention.
        num_heads: Heads of each stage.
        d_state: Channels of queries and keys.
        expand: Channels of the values, as a multiple of those of the stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block.

    Example:
        >>> import torch
        >>> model = VSSD(num_classes=10, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 8, 4),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        d_state: int = 64,
        expand: int = 2,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}

        def make_block(stage: int, rate: float) -> VSSDBlock:
            dim, heads = embed_dim * 2**stage, num_heads[stage]
            if stage == len(depths) - 1:
                attn: nn.Module = SoftmaxAttention(dim, heads, **factory)
            else:
                attn = NonCausalSSD(dim, heads, expand, d_state, **factory)
            return VSSDBlock(attn, dim, mlp_ratio, proj_drop_rate, rate, **factory)

        super().__init__(
            make_block,
            embed_dim=embed_dim,
            depths=depths,
            drop_path_rate=drop_path_rate,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **factory,
        )


default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(
            first_conv="patch_embed.conv1.conv",
            origin_url="https://github.com/YuHengsss/VSSD",
            paper_ids="arXiv:2407.18559",
        )
        for name in ("vssd_micro", "vssd_tiny", "vssd_small", "vssd_base")
    }
)


_create = partial(create_staged, VSSD)


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-Micro: 14M parameters, 2.3G FLOPs."""
    defaults = {"embed_dim": 48, "depths": (2, 2, 8, 4), "num_heads": (2, 4, 8, 16), "d_state": 48}
    return _create("vssd_micro", pretrained, defaults, kwargs)


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-T: 24M parameters, 4.5G FLOPs."""
    defaults = {"embed_dim": 64, "depths": (2, 4, 8, 4), "num_heads": (2, 4, 8, 16)}
    return _create("vssd_tiny", pretrained, defaults, kwargs)


@register_model
def vssd_small(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-S: 40M parameters, 7.4G FLOPs."""
    defaults = {"embed_dim": 64, "depths": (3, 4, 21, 5), "num_heads": (2, 4, 8, 16)}
    return _create("vssd_small", pretrained, defaults, kwargs)


@register_model
def vssd_base(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-B: 89M parameters, 16.1G FLOPs."""
    defaults = {"embed_dim": 96, "depths": (3, 4, 21, 5), "num_heads": (3, 6, 12, 24)}
    return _create("vssd_base", pretrained, defaults, kwargs)

"""MLLA (MILA in the final paper): a backbone with the block design of Mamba and linear attention.

    mix(x) = W_out (attn(SiLU(dwc(W_in x))) * SiLU(W_act x))

attn is `fbila.layers.MLLALinearAttention`. Han et al., "Demystify Mamba in Vision: A Linear
Attention Perspective", NeurIPS 2024, https://arxiv.org/abs/2405.16605; LeapLabTHU/MLLA.

State dicts are those of the official releases but for `rope.rotations`, the rotary tables of the
training resolution: they are compared with the formula and not kept.
"""

from functools import partial
from typing import Any

from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from ..layers import MLLALinearAttention
from ..layers.depthwise_conv import DepthwiseConv2d
from ..layers.linear import Linear
from ..layers.over_tokens import over_tokens
from ..ops.silu_gate_library import silu_gate
from .casting import paths
from .conv_tokens import TokenBackbone, TokenBlock
from .default_cfg import imagenet_cfg
from .stages import create_staged

# FX cannot follow what it does with sizes.
register_notrace_module(MLLALinearAttention)


@register_notrace_module
class Gate(nn.Module):
    """`x SiLU(g)`: of modules alone, tracers of graphs do not look inside."""

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return silu_gate(x, g)


class MLLABlock(TokenBlock):
    """One block, `(B, H, W, C)` to the same shape."""

    maps = paths("in_proj", "act_proj", "attn.qk", "out_proj", "mlp.fc1", "mlp.fc2")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(dim, mlp_ratio, proj_drop, drop_path, **factory)
        self.in_proj = Linear(dim, dim, **factory)
        self.act_proj = Linear(dim, dim, **factory)
        self.dwc = DepthwiseConv2d(dim, 3, **factory)
        self.attn = MLLALinearAttention(dim, num_heads, qkv_bias, **factory)
        self.gate = Gate()
        self.out_proj = Linear(dim, dim, **factory)

    def mix(self, x: Tensor) -> Tensor:
        own: Any = self._modules
        B, H, W, C = x.shape
        gate = own["act_proj"](x)
        x = over_tokens(own["dwc"], own["in_proj"](x), silu=True)
        x = own["attn"](x.reshape(B, H * W, C), H, W).reshape(B, H, W, C)
        return own["out_proj"](own["gate"](x, gate))


class MLLA(TokenBackbone):
    """The backbone, from `(B, in_chans, H, W)` of any H and W to `(B, num_classes)`.

    Args:
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for pooled features.
        global_pool: As in timm.
        embed_dim: Channels of the first stage, doubled from each stage to the next.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple.
        qkv_bias: Adds a bias to the query and key projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block.

    Example:
        >>> import torch
        >>> model = MLLA(num_classes=10, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
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
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}

        def make_block(stage: int, rate: float) -> MLLABlock:
            dim, heads = embed_dim * 2**stage, num_heads[stage]
            return MLLABlock(dim, heads, mlp_ratio, qkv_bias, proj_drop_rate, rate, **factory)

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
            origin_url="https://github.com/LeapLabTHU/MLLA",
            paper_ids="arXiv:2405.16605",
        )
        for name in ("mlla_tiny", "mlla_small", "mlla_base")
    }
)


_create = partial(create_staged, MLLA)


@register_model
def mlla_tiny(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-T: 25M parameters, 4.2G FLOPs."""
    defaults = {"embed_dim": 64, "depths": (2, 4, 8, 4), "num_heads": (2, 4, 8, 16)}
    return _create("mlla_tiny", pretrained, defaults, kwargs)


@register_model
def mlla_small(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-S: 43M parameters, 7.3G FLOPs."""
    defaults = {"embed_dim": 64, "depths": (3, 6, 21, 6), "num_heads": (2, 4, 8, 16)}
    return _create("mlla_small", pretrained, defaults, kwargs)


@register_model
def mlla_base(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-B: 96M parameters, 16.2G FLOPs."""
    defaults = {"embed_dim": 96, "depths": (3, 6, 21, 6), "num_heads": (3, 6, 12, 24)}
    return _create("mlla_base", pretrained, defaults, kwargs)

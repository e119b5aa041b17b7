"""What MLLA and VSSD have in common: all but what mixes the tokens.

    x <- x + dwc(x)          x <- x + mix(norm(x))
    x <- x + dwc(x)          x <- x + mlp(norm(x))

dwc are depthwise 3 x 3 convolutions, from which the tokens know where they are. x is
`(B, H, W, C)`, whose tokens are mixed as `(B, H * W, C)`, a view.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.efficientvit_mit import ConvNormAct
from torch import Tensor, nn

from ..layers.depthwise_conv import DepthwiseConv2d
from ..layers.layer_norm import LayerNorm
from ..layers.pointwise_conv import PointwiseConv2d
from .backbone import init_linear
from .branch import add_branch
from .casting import casting
from .mlp import Mlp
from .stages import Stage, StagedBackbone, over_grid, with_conv


class ConvStem(nn.Module):
    """`(B, in_chans, H, W)` to `(B, H / 4, W / 4, dim)`, rounded up, by five convolutions."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, stride=2, **factory)
        self.conv2 = nn.Sequential(
            ConvNormAct(half, half, **factory),
            ConvNormAct(half, half, act_layer=None, **factory),
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * dim, stride=2, **factory),
            ConvNormAct(4 * dim, dim, 1, act_layer=None, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        # As the norms and linear layers of all blocks read it.
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        x = self.conv3(self.conv2(x) + x)
        return x.permute(0, 2, 3, 1).contiguous()


class ConvDownsample(nn.Module):
    """`(B, H, W, dim)` to `(B, H / 2, W / 2, 2 * dim)`, rounded up, through 8 * dim channels."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        wide = 8 * dim
        plain: Any = {"bias": True, "norm_layer": None, **factory}
        self.conv = nn.Sequential(
            ConvNormAct(dim, wide, 1, **plain),
            ConvNormAct(wide, wide, 3, stride=2, groups=wide, **plain),
            ConvNormAct(wide, 2 * dim, 1, bias=True, act_layer=None, **factory),
        )
        # The same, but that a product adds the bias.
        for layer in (self.conv[0], self.conv[2]):
            layer.conv.__class__ = PointwiseConv2d

    def forward(self, x: Tensor) -> Tensor:
        return over_grid(self.conv, x)


class TokenBlock(nn.Module):
    """The block; a subclass has `mix`, from `(B, H, W, C)` to the same shape, linear maps first.

    `maps` are the paths of its linear maps.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden channels of the MLP, as a multiple of C.
        proj_drop: Dropout in the MLP.
        drop_path: Stochastic depth.
    """

    maps: tuple[tuple[str, ...], ...]

    def __init__(
        self, dim: int, mlp_ratio: float, proj_drop: float, drop_path: float, **factory: Any
    ) -> None:
        super().__init__()
        self.cpe1 = DepthwiseConv2d(dim, 3, **factory)
        self.norm1 = LayerNorm(dim, for_maps=True, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = DepthwiseConv2d(dim, 3, **factory)
        self.norm2 = LayerNorm(dim, for_maps=True, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **factory)

    @casting
    def forward(self, x: Tensor) -> Tensor:
        own: Any = self._modules
        x = with_conv(own["cpe1"], x)
        x = add_branch(x, self.mix(own["norm1"](x)), own["drop_path"])
        x = with_conv(own["cpe2"], x)
        return add_branch(x, own["mlp"](own["norm2"](x)), own["drop_path"])

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TokenBackbone(StagedBackbone):
    """The backbone of such blocks, whose channels double from each stage to the next.

    Args:
        make_block: A block, given the index of its stage and its stochastic depth.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        drop_path_rate: Stochastic depth of the last block; that of the first is 0.
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for pooled features.
        global_pool: As in timm.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        make_block: Callable[[int, float], TokenBlock],
        *,
        embed_dim: int,
        depths: Sequence[int],
        drop_path_rate: float,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **factory: Any,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        downsamples = [*(ConvDownsample(width, **factory) for width in widths[:-1]), None]
        stages = [
            Stage([make_block(i, rate) for rate in rates[i]], downsample)
            for i, downsample in enumerate(downsamples)
        ]
        super().__init__(ConvStem(in_chans, embed_dim, **factory), stages, widths, in_chans)
        self.norm = LayerNorm(widths[-1], **factory)
        self.make_head(num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)

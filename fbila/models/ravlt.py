"""RAVLT: a backbone of rank-augmented linear attention, with softmax attention in the last stages.

Attention is `fbila.layers.RALA` in the first two stages and `SoftmaxPictureAttention`, the same
layer but for the mixing, in the last two.
Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025,
https://arxiv.org/abs/2411.07635; qhfan/RALA.

State dicts are those of the official releases but for `RoPE.angle`, the frequencies of the rotary
embedding: they are compared with the formula and not kept.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, create_classifier
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from ..layers import RALA
from .default_cfg import imagenet_cfg
from .ravlt_block import RAVLTBlock, SoftmaxPictureAttention, StageRotary
from .stages import Stage, StagedBackbone, create_staged, over_grid


class RAVLTStage(Stage):
    """A stage whose blocks share the rotary tables of its grid."""

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None, head_dim: int
    ) -> None:
        super().__init__(blocks, downsample)
        self.RoPE = StageRotary(head_dim, endpoint=True)


class RAVLTStem(nn.Module):
    """`(B, in_chans, H, W)` to `(B, H / 4, W / 4, dim)`, rounded up."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1)):
            layers += _conv_norm(before, after, stride, **factory)
            layers.append(nn.GELU())
        self.proj = nn.Sequential(*layers, *_conv_norm(half, dim, 2, **factory))

    def forward(self, x: Tensor) -> Tensor:
        # As all blocks read it.
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return x.permute(0, 2, 3, 1).contiguous()


class RAVLTDownsample(nn.Module):
    """`(B, H, W, dim)` to `(B, H / 2, W / 2, out_dim)`, rounded up."""

    def __init__(self, dim: int, out_dim: int, **factory: Any) -> None:
        super().__init__()
        self.reduction, self.norm = _conv_norm(dim, out_dim, 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return over_grid(self.norm, over_grid(self.reduction, x))


def _conv_norm(before: int, after: int, stride: int, **factory: Any) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, 3, stride, padding=1, **factory)
    return [conv, nn.BatchNorm2d(after, **factory)]


class RAVLT(StagedBackbone):
    """The backbone, from `(B, in_chans, H, W)` of any H and W to `(B, num_classes)`.

    Args:
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for pooled features.
        global_pool: As in timm.
        dims: Channels of each stage.
        depths: Blocks of each stage; those of the last two have softmax attention.
        num_heads: Heads of each stage, of a multiple of 4 channels each.
        mlp_ratio: Hidden channels of ffn, as a multiple.
        layer_scales: What the g of each stage begin as.
        projection: Channels after the last stage, which the classifier sees.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in ffn.
        drop_path_rate: Stochastic depth of the last block.

    Example:
        >>> import torch
        >>> small = {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
        >>> model = RAVLT(num_classes=10, **small)
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mlp_ratio: float = 3.5,
        layer_scales: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            attention = RALA if i < len(dims) - 2 else SoftmaxPictureAttention
            blocks = [
                RAVLTBlock(
                    attention(dim, heads, **factory),
                    dim,
                    mlp_ratio,
                    layer_scales[i],
                    proj_drop_rate,
                    rate,
                    **factory,
                )
                for rate in rates[i]
            ]
            is_last = i == len(dims) - 1
            downsample = None if is_last else RAVLTDownsample(dim, dims[i + 1], **factory)
            stages.append(RAVLTStage(blocks, downsample, dim // heads))
        super().__init__(RAVLTStem(in_chans, dims[0], **factory), stages, dims, in_chans)
        self.feature_info[-1]["num_chs_norm"] = projection
        self.num_features = self.head_hidden_size = projection
        self.proj: nn.Module = nn.Conv2d(dims[-1], projection, 1, **factory)
        self.norm = nn.BatchNorm2d(projection, **factory)
        self.act: nn.Module = nn.SiLU()
        self.make_head(num_classes, global_pool, drop_rate, **factory)
        self.apply(_init_weights)

    def make_head(self, num_classes: int, global_pool: str, drop_rate: float, **factory) -> None:
        """Makes the classifier, a 1 x 1 convolution of pictures `(B, C, H, W)`."""
        self.num_classes = num_classes
        self.global_pool, self.head_drop, self.head = create_classifier(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            use_conv=True,
            drop_rate=drop_rate,
            **factory,
        )

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        x = self.enter(stage, x)
        rotary = self.layers[stage].RoPE(x.shape[1], x.shape[2], x)
        for block in self.blocks(stage):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotary)
            else:
                x = block(x, rotary)
        return x

    def forward_norm(self, x: Tensor) -> Tensor:
        return self.act(over_grid(self.norm, over_grid(self.proj, x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x.permute(0, 3, 1, 2)))
        x = x if pre_logits else self.head(x)
        return x.flatten(1) if self.global_pool.pool_type else x

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """As in `Backbone`, but the last norm goes with the classifier alone.

        It comes after the projection to the channels that the classifier takes.
        """
        taken = super().prune_intermediate_layers(indices, prune_norm and prune_head, prune_head)
        if isinstance(self.norm, nn.Identity):
            self.proj, self.act = nn.Identity(), nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max(taken)]["num_chs"]
        return taken


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(
            first_conv="patch_embed.proj.0",
            origin_url="https://github.com/qhfan/RALA",
            paper_ids="arXiv:2411.07635",
        )
        for name in ("ravlt_tiny", "ravlt_small", "ravlt_base", "ravlt_large")
    }
)


_create = partial(create_staged, RAVLT)


@register_model
def ravlt_tiny(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-T: 15M parameters, 2.4G FLOPs, without those of attention's products."""
    defaults = {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
    return _create("ravlt_tiny", pretrained, defaults, kwargs)


@register_model
def ravlt_small(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-S: 26M parameters, 4.6G FLOPs, without those of attention's products."""
    defaults = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create("ravlt_small", pretrained, defaults, kwargs)


@register_model
def ravlt_base(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-B: 48M parameters, 9.9G FLOPs, without those of attention's products."""
    defaults = {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scales": (1.0, 1.0, 1e-6, 1e-6),
    }
    return _create("ravlt_base", pretrained, defaults, kwargs)


@register_model
def ravlt_large(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    """RAVLT-L: 95M parameters, 16.0G FLOPs, without those of attention's products."""
    defaults = {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scales": (1e-6,) * 4,
    }
    return _create("ravlt_large", pretrained, defaults, kwargs)

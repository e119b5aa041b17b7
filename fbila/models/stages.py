"""Backbones whose stages end with the downsampling to the next one: MLLA, VSSD and RAVLT.

patch_embed -> layers[0].blocks -> layers[0].downsample -> layers[1].blocks -> ...
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ..layers.depthwise_conv import DepthwiseConv2d
from ..layers.over_tokens import over_tokens
from .backbone import Backbone


class Stage(nn.Module):
    """Blocks over one grid and the way to the next, under their official names.

    Args:
        blocks: From `(B, H, W, C)` to the same shape.
        downsample: To the grid of the next stage; None in the last one.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class StagedBackbone(Backbone):
    """Such a backbone of `patch_embed`, `layers`, `norm` and `head`.

    Args:
        patch_embed: From `(B, in_chans, H, W)` to `(B, H / 4, W / 4, C)`.
        stages: The stages.
        widths: Channels C of each of them.
        in_chans: Channels of the pictures.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[Stage],
        widths: Sequence[int],
        in_chans: int,
    ) -> None:
        # The last block of each, whose output is that of all.
        names = [f"layers.{i}.blocks.{len(stage.blocks) - 1}" for i, stage in enumerate(stages)]
        super().__init__(in_chans, widths, 4, names)
        self.patch_embed = patch_embed
        self.layers: Any = nn.ModuleList(stages)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        return self.layers[stage - 1].downsample(x) if stage else self.patch_embed(x)

    def blocks(self, stage: int) -> nn.Sequential:
        return self.layers[stage].blocks

    def keep_stages(self, kept: int) -> None:
        self.layers = self.layers[:kept]
        self.layers[-1].downsample = None

    def forward_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers that timm's layer-wise learning rates go by."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.(?:downsample|RoPE)", (99998,)),
            (r"^(?:proj|norm)\.", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


M = TypeVar("M", bound=StagedBackbone)


def create_staged(
    model: type[M], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> M:
    """A model as timm makes one of that name: its own options over the variant's defaults."""
    return build_model_with_cfg(
        model,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


def over_grid(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """`(B, H, W, C)` through what takes `(B, C, H, W)`: a view of it, in channels_last."""
    return module(x.permute(0, 3, 1, 2), *args, **options).permute(0, 2, 3, 1)


def with_conv(conv: DepthwiseConv2d, x: Tensor) -> Tensor:
    """`x + conv(x)` of `(B, H, W, C)`."""
    return over_tokens(conv, x, residual=True)

"""The Pyramid Vision Transformer with linear attention.

Each stage cuts the picture, or the features of the stage before, into patches, adds what it has
learned of each position, and goes through its blocks.
Wang et al., "Pyramid Vision Transformer", ICCV 2021, https://arxiv.org/abs/2102.12122; with linear
attention LeapLabTHU/FLatten-Transformer and ZacharyMeng/PolaFormer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ..layers.grid import resize_positions
from ..layers.layer_norm import LayerNorm
from .backbone import Backbone, init_linear
from .grid_block import GridBlock, resized
from .patches import Patches
from .weights import fit_positions

# That of patches has PyTorch's own epsilon.
SmallEpsNorm = partial(LayerNorm, eps=1e-6)


class PyramidVisionTransformer(Backbone):
    """PVT: pictures `(B, in_chans, H, W)` of any size to `(B, num_classes)`.

    Parameters bear the names and shapes of the official FLatten-PVT and PolaFormer-PVT. Positions
    belong to the grids of `img_size`, and are resized for any other. Patches that a picture does
    not fill are filled with zeros.

    Args:
        attention: Makes the attention of a block: a layer of `fbila.layers` with `sr_ratio`.
        img_size: (rows, columns) of the pictures that positions are made for.
        patch_size: Side of the patches of the first stage.
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for none.
        global_pool: How the last features are pooled, as in timm.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads in each stage.
        mlp_ratios: Hidden channels of the MLPs of each stage, as multiples.
        sr_ratios: In each stage, by how much the grid of keys and values is reduced.
        strict_img_size: Refuses pictures of any size but `img_size`.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after positions are added.
        proj_drop_rate: Dropout after the projections of the blocks.
        drop_path_rate: Stochastic depth of the last block.
        norm_layer: Makes the norms of the blocks.

    Example:
        >>> import torch
        >>> from fbila.layers import FocusedLinearAttention
        >>> model = PyramidVisionTransformer(
        ...     FocusedLinearAttention, 64, num_classes=10, embed_dims=(8, 16, 40, 64)
        ... )
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (1, 1, 1, 1),
        strict_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = SmallEpsNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        names = [f"block{i + 1}.{depth - 1}" for i, depth in enumerate(depths)]
        super().__init__(in_chans, embed_dims, patch_size, names)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.grid_sizes: list[tuple[int, int]] = []
        size, width = to_2tuple(img_size), in_chans
        for i, dim in enumerate(embed_dims):
            side = patch_size if i == 0 else 2
            patches = Patches(size, side, width, dim, strict_img_size, **factory)
            size, width = patches.dynamic_feat_size(size), dim
            self.grid_sizes.append(size)
            positions = nn.Parameter(torch.empty(1, size[0] * size[1], dim, **factory))
            make_attention = partial(
                attention,
                dim,
                num_heads[i],
                qkv_bias=True,
                proj_drop=proj_drop_rate,
                grid_size=size,
                sr_ratio=sr_ratios[i],
                **factory,
            )
            options = (dim, mlp_ratios[i], proj_drop_rate)
            self.add_module(f"patch_embed{i + 1}", patches)
            self.register_parameter(f"pos_embed{i + 1}", trunc_normal_(positions, std=0.02))
            self.add_module(
                f"block{i + 1}",
                nn.Sequential(
                    *(
                        GridBlock(make_attention(), *options, rate, norm_layer, **factory)
                        for rate in rates[i]
                    )
                ),
            )
        self.add_positions = AddPositions()
        self.pos_drop = nn.Dropout(pos_drop_rate)
        # In the checkpoints but not in the model, there as here: only pooling follows the blocks.
        self.norm = norm_layer(width, **factory).requires_grad_(False)
        self.make_head(num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        if stage > 0:
            x = x.permute(0, 3, 1, 2)
        x = self.get_submodule(f"patch_embed{stage + 1}")(x)
        positions = getattr(self, f"pos_embed{stage + 1}")
        return self.pos_drop(self.add_positions(x, positions, self.grid_sizes[stage]))

    def blocks(self, stage: int) -> nn.Sequential:
        blocks: Any = self.get_submodule(f"block{stage + 1}")
        return blocks

    def keep_stages(self, kept: int) -> None:
        for stage in range(kept, self.num_stages):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{stage + 1}")
        del self.grid_sizes[kept:]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resizes what has been learned of positions for pictures of another size, for good.

        Args:
            img_size: Their (rows, columns), or the side of squares.
        """
        size = to_2tuple(img_size)
        for stage in range(self.num_stages):
            patches: Any = self.get_submodule(f"patch_embed{stage + 1}")
            patches.set_input_size(img_size=size)
            native, size = self.grid_sizes[stage], patches.dynamic_feat_size(size)
            name = f"pos_embed{stage + 1}"
            setattr(self, name, resized(self.get_parameter(name), native, size))
            blocks: Any = self.blocks(stage)
            for block in blocks:
                block.set_grid_size(size)
            self.grid_sizes[stage] = size

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none, as in the official training."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters in groups by depth, for learning rates by layer."""
        stem = r"^(?:patch_embed|pos_embed)1"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:patch_embed|pos_embed|block)(\d+)"}
        blocks = [
            (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
            (r"^block(\d+)\.(\d+)", None),
            (r"^norm\.", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}


def create_pvt(
    variant: str, pretrained: bool, layer: Callable[..., nn.Module], **kwargs: Any
) -> PyramidVisionTransformer:
    """PVT as timm makes a model of that name, with features and weights."""
    return build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=fit_positions,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"attention": layer, **kwargs},
    )


@register_notrace_module
class AddPositions(nn.Module):
    """A grid plus a table `(1, N, C)` of what was learned of each position of another.

    A module because it looks at the size, of which there is none while a graph is traced.
    """

    def forward(self, x: Tensor, table: Tensor, native: tuple[int, int]) -> Tensor:
        _, H, W, _ = x.shape
        return x + resize_positions(table, native, (H, W)).unflatten(1, (H, W)).to(x.dtype)

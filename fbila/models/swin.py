"""Swin Transformer whose first stages have linear attention, over the whole grid.

Where softmax needs windows, linear attention has one as large as the grid: so it is in all
official configurations (56 at stage 1 and 28 at stage 2, of 224 x 224). The other stages are
Swin's own, with shifted windows.
Liu et al., "Swin Transformer", ICCV 2021, https://arxiv.org/abs/2103.14030; with linear attention
LeapLabTHU/FLatten-Transformer and ZacharyMeng/PolaFormer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg
from timm.models.swin_transformer import calc_stage_window_sizes
from torch import nn

from ..layers.layer_norm import LayerNorm
from .backbone import init_linear
from .grid_block import GridBlock
from .patches import Merging, Patches
from .stages import Stage, StagedBackbone
from .weights import fit_positions
from .window_block import WindowBlock

SWIN_BASE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
}


class SwinTransformer(StagedBackbone):
    """Swin: pictures `(B, in_chans, H, W)` of any size to `(B, num_classes)`.

    Parameters bear the names and shapes of the official FLatten-Swin and PolaFormer-Swin. Their
    checkpoints also hold what follows from the sizes of pictures and windows, `attn_mask` and
    `relative_position_index`, which is left out on loading.

    Positions of linear attention belong to the grids of `img_size`, and are resized for any other.
    Windows stay as they are; what a picture does not fill of patches and windows is zeros.

    Args:
        attention: What makes the attention of the blocks of each stage: a layer of `fbila.layers`
            with `grid_size`, or None for softmax attention in shifted windows.
        img_size: (rows, columns) of the pictures that positions and windows are made for.
        in_chans: Channels of the pictures.
        num_classes: Classes; 0 for none.
        global_pool: How the last features are pooled, as in timm.
        embed_dim: Channels of the first stage, doubled from each stage to the next.
        depths: Blocks of each stage.
        num_heads: Heads in each stage.
        window_size: Side of the windows. Every other block shifts them by half of it, unless they
            are as large as the grid.
        mlp_ratio: Hidden channels of the MLPs, as a multiple.
        strict_img_size: Refuses pictures of any size but `img_size`.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the projections of the blocks.
        attn_drop_rate: Dropout of attention maps, in the stages that have some.
        drop_path_rate: Stochastic depth of the last block.

    Example:
        >>> import torch
        >>> from fbila.layers import FocusedLinearAttention
        >>> attention = (FocusedLinearAttention, FocusedLinearAttention, None, None)
        >>> model = SwinTransformer(attention, 64, embed_dim=24, num_classes=10)
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        attention: Sequence[Callable[..., nn.Module] | None],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        strict_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        size = to_2tuple(img_size)
        patch_embed = Patches(size, 4, in_chans, embed_dim, strict_img_size, **factory)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        shared = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, **factory}
        grids = _grid_sizes(patch_embed, len(depths))
        stages: list[Stage] = []
        for dim, heads, make, rate, grid in zip(
            widths, num_heads, attention, rates, grids, strict=True
        ):
            blocks: list[nn.Module] = []
            for j, drop_path in enumerate(rate):
                if make is None:
                    block: nn.Module = WindowBlock(
                        dim,
                        grid,
                        heads,
                        window_size=window_size,
                        shift_size=j % 2 * (window_size // 2),
                        attn_drop=attn_drop_rate,
                        drop_path=drop_path,
                        **shared,
                    )
                else:
                    attn = make(
                        dim, heads, True, proj_drop=proj_drop_rate, grid_size=grid, **factory
                    )
                    block = GridBlock(attn, dim, drop_path=drop_path, **shared)
                blocks.append(block)
            last = len(stages) == len(depths) - 1
            stages.append(Stage(blocks, None if last else Merging(dim, **factory)))
        super().__init__(patch_embed, stages, widths, in_chans)
        self._window = to_2tuple(window_size), patch_embed.grid_size
        self.norm = LayerNorm(widths[-1], **factory)
        self.make_head(num_classes, global_pool, drop_rate, **factory)
        self.apply(init_linear)
        self.register_load_state_dict_pre_hook(_leave_out_buffers)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Makes positions and windows for pictures of another size, for good.

        Args:
            img_size: Their (rows, columns), or the side of squares; None: as before.
            window_size: (rows, columns) of the windows; None: scaled as the grid is, as they are in
                the official model for 384 x 384.
        """
        patch_embed: Any = self.patch_embed
        patch_embed.set_input_size(img_size=img_size)
        grid = tuple(patch_embed.dynamic_feat_size(patch_embed.img_size))
        window, native = self._window
        (window,) = calc_stage_window_sizes(grid, (window,), native, window_size)
        if window_size is not None:
            self._window = window, grid
        for stage, size in zip(self.layers, _grid_sizes(patch_embed, self.num_stages), strict=True):
            for block in stage.blocks:
                if isinstance(block, WindowBlock):
                    block.set_input_size(size, window)
                else:
                    block.set_grid_size(size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay."""
        return {
            name for name, _ in self.named_parameters() if "relative_position_bias_table" in name
        }


def create_swin(
    variant: str, pretrained: bool, layer: Callable[..., nn.Module], **kwargs: Any
) -> SwinTransformer:
    """Swin as timm makes a model of that name, with linear attention in the first two stages."""
    return build_model_with_cfg(
        SwinTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=fit_positions,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"attention": (layer, layer, None, None), **kwargs},
    )


def _grid_sizes(patch_embed: Any, stages: int) -> list[tuple[int, int]]:
    """Rows and columns of each stage, halved and rounded up from one to the next."""
    rows, columns = patch_embed.dynamic_feat_size(patch_embed.img_size)
    return [(-(-rows // 2**i), -(-columns // 2**i)) for i in range(stages)]


def _leave_out_buffers(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if name.endswith((".attn_mask", ".relative_position_index")):
            del state_dict[name]

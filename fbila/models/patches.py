"""Patches of pictures of any size, and of the grids that they make."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..layers.layer_norm import LayerNorm


class Patches(PatchEmbed):
    """timm's patch embedding, `(B, in_chans, H, W)` to `(B, H / patch, W / patch, dim)`.

    Args:
        img_size: (rows, columns) of the pictures.
        patch_size: Side of the patches.
        in_chans: Channels of the pictures.
        dim: Channels of the patches.
        strict_img_size: Refuses pictures of any other size. Otherwise patches that a picture does
            not fill are filled with zeros.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        dim: int,
        strict_img_size: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            dim,
            norm_layer=LayerNorm,
            output_fmt="NHWC",
            strict_img_size=strict_img_size,
            dynamic_img_pad=not strict_img_size,
            **factory,
        )
        self.fill = Fill()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures to patches."""
        if self.strict_img_size:
            return super().forward(x)
        x = self.proj(self.fill(x, self.patch_size))
        return self.norm(x.permute(0, 2, 3, 1))


class Merging(PatchMerging):
    """timm's patch merging, `(B, H, W, C)` to `(B, H / 2, W / 2, 2 C)`, rounded up."""

    def __init__(self, dim: int, **factory: Any) -> None:
        norm: Any = partial(LayerNorm, for_maps=True)
        super().__init__(dim, norm_layer=norm, **factory)
        self.fill = Fill()

    def forward(self, x: Tensor) -> Tensor:
        """A grid to one of half the size."""
        x = self.fill(x.permute(0, 3, 1, 2), (2, 2)).permute(0, 2, 3, 1)
        # (B, H / 2, 2, W / 2, 2, C): of the four of a patch, columns come before rows.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


@register_notrace_module
class Fill(nn.Module):
    """Zeros to the right of and below `(B, C, H, W)`, up to multiples of a size.

    A module of its own because it looks at H and W, which are not known while a graph is traced.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = -x.shape[-2] % size[0], -x.shape[-1] % size[1]
        # Not always, as timm does: without a branch, sizes not known beforehand become remainders
        # within remainders from stage to stage, which take minutes to compile.
        return F.pad(x, (0, columns, 0, rows)) if rows or columns else x

"""UNets whose norms, activations and sums are fewer and faster kernels.

    with fused_blocks(pipeline):
        image = pipeline(prompt).images[0]

The same picture but for rounding, with LinFusion mounted or not, and undone at the end of the block
or by `undo()`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..diffusers import resolve_model
from ..host import host
from ..report import AdapterError
from .block_forwards import (
    GEGLU,
    FusedGEGLU,
    FusedGroupNorm,
    FusedLayerNorm,
    FusedResnetBlock2D,
    FusedTransformer2DModel,
    ResnetBlock2D,
    Transformer2DModel,
)

with host("diffusers"):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock

_FUSED: dict[type, Any] = {
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2DModel,
    GEGLU: FusedGEGLU,
    nn.LayerNorm: FusedLayerNorm,
    nn.GroupNorm: FusedGroupNorm,
}
_STOCK: dict[type, type] = {fused: stock for stock, fused in _FUSED.items()}


class FusedBlocks:
    """The fused blocks of one UNet; turned on by `fused_blocks`. A context manager.

    A copy of the UNet has fused blocks too: `FusedBlocks(copy).undo()`.

    Attributes:
        unet: The UNet.
        counts: How many modules run another way, by the name of their class.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        kinds = (_STOCK[type(m)].__name__ for m in unet.modules() if type(m) in _STOCK)
        self.counts = dict(Counter(kinds))

    def undo(self) -> None:
        """Lets the UNet run as it did; done twice, changes nothing."""
        for module in self.unet.modules():
            if type(module) in _STOCK:
                module.__class__ = _STOCK[type(module)]
        self.counts = {}

    def __enter__(self) -> "FusedBlocks":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def fused_blocks(model: Any) -> FusedBlocks:
    """Runs what surrounds attention in a UNet by kernels that read and write memory less often.

    GroupNorm with SiLU and with what is added in front of it, LayerNorm, GEGLU, and the sums with
    their biases at the end of residual blocks are a kernel each. Everything is computed in float32
    and rounded less often than before. Weights, modules and their names stay what they are, so that
    LoRAs, hooks and other plugins find them.

    For CUDA, under autocast too. There are gradients of what goes through the blocks, as training
    of LoRAs and of LinFusion's layers needs them, and gradients of gradients are refused. Blocks
    whose own weights are trained run as they come, and so do all in compiled or exported models,
    where compilers do this themselves.

    Args:
        model: A pipeline with a UNet, or the UNet; with LinFusion mounted or not.

    Returns:
        The mode, on already; `undo()` it, or use it in a `with`. Its `counts` say what runs so.

    Raises:
        AdapterError: If the model is no `UNet2DConditionModel`, has fused blocks already, or has
            none to fuse.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> with fused_blocks(unet) as mode:
        ...     mode.counts["ResnetBlock2D"], mode.counts["LayerNorm"]
        (12, 18)
    """
    unet = resolve_model(model)
    kind: type = type(unet)
    if not issubclass(kind, UNet2DConditionModel):
        raise AdapterError(f"fused_blocks is for UNet2DConditionModel, got {kind.__name__}.")
    if FusedBlocks(unet).counts:
        raise AdapterError("The blocks of this UNet are fused already. Undo that first.")
    found = [module for module in candidates(unet) if fits(module)]
    if not found:
        raise AdapterError(
            f"This {kind.__name__} has no blocks that fused_blocks knows, or hooks have "
            "replaced the forward of all of them."
        )
    for module in found:
        module.__class__ = _FUSED[type(module)]
    return FusedBlocks(unet)


def candidates(unet: Any) -> Iterator[nn.Module]:
    """The modules of a UNet that are looked at. Other norms, as in attention, are left alone."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel | GEGLU):
            yield module
        elif isinstance(module, BasicTransformerBlock):
            yield from (norm for norm in (module.norm1, module.norm2, module.norm3) if norm)
    if unet.conv_norm_out is not None:
        yield unet.conv_norm_out


def fits(module: nn.Module) -> bool:
    """Whether it is exactly what a fused class stands for, and not under a hook's forward."""
    fused = _FUSED.get(type(module))
    if fused is None or "forward" in vars(module):
        return False
    return fused is FusedGEGLU or fused.fits(module)

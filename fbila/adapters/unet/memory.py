"""UNets on pictures whose activations would not fit: 16384 x 16384 on one GPU.

    with low_memory(pipeline):
        image = pipeline(prompt, height=16384, width=16384).images[0]

Slower, the same picture but for rounding, and undone at the end of the block or by `undo()`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..diffusers import resolve_model
from ..host import host
from ..report import AdapterError
from .memory_blocks import down_block_forward, transformer_block_forward, up_block_forward
from .memory_convolution import by_rows, convolve, upsample_forward

with host("diffusers"):
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.unets.unet_2d_blocks import (
        CrossAttnDownBlock2D,
        CrossAttnUpBlock2D,
        DownBlock2D,
        UpBlock2D,
    )
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from diffusers.models.upsampling import Upsample2D

_FORWARDS: dict[type, Callable] = {
    CrossAttnDownBlock2D: down_block_forward,
    DownBlock2D: down_block_forward,
    CrossAttnUpBlock2D: up_block_forward,
    UpBlock2D: up_block_forward,
}


class LowMemory:
    """The low-memory mode of one UNet; made by `low_memory`. A context manager.

    Attributes:
        unet: The UNet.
        modules: Those of its modules that run another way meanwhile.
    """

    def __init__(self, unet: nn.Module, forwards: dict[nn.Module, Callable]) -> None:
        self.unet = unet
        self.modules = list(forwards)
        for module, forward in forwards.items():
            vars(module)["forward"] = functools.partial(forward, module)

    def undo(self) -> None:
        """Lets the UNet run as it did; done twice, changes nothing."""
        for module in self.modules:
            vars(module).pop("forward", None)
        self.modules = []

    def __enter__(self) -> "LowMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def low_memory(model: Any, *, tokens: int = 131072) -> LowMemory:
    """Makes a UNet keep as little as possible in the memory of the GPU, for inference.

    Samples of a batch (the two of classifier-free guidance) run one after the other; skip
    connections wait in pinned memory of the CPU; norms and activations work in place; convolutions
    go over some rows at a time; and transformer blocks over `tokens` tokens, LinFusion's attention
    too, whose state is summed over the pieces. Softmax self-attention still takes all tokens at
    once.

    Args:
        model: A pipeline with a UNet, or the UNet; with LinFusion mounted or not.
        tokens: What transformer blocks process at a time.

    Returns:
        The mode, on already; `undo()` it, or use it in a `with`.

    Raises:
        AdapterError: If the model is no `UNet2DConditionModel`, has blocks of other kinds than
            Stable Diffusion's, or carries hooks that replace the forward of its blocks.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> with low_memory(unet) as mode:
        ...     len(mode.modules)
        59
    """
    if tokens < 1:
        raise AdapterError(f"tokens must be positive, got {tokens}.")
    unet: Any = resolve_model(model)
    kind: type = type(unet)
    if kind is not UNet2DConditionModel:
        raise AdapterError(f"low_memory is for UNet2DConditionModel, got {kind.__name__}.")
    forwards: dict[nn.Module, Callable] = {unet: one_at_a_time}
    for block in (*unet.down_blocks, *unet.up_blocks):
        if type(block) not in _FORWARDS:
            raise AdapterError(f"low_memory does not know {type(block).__name__}.")
        forwards[block] = _FORWARDS[type(block)]
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock) and module.norm_type == "layer_norm":
            forwards[module] = functools.partial(_with_tokens, tokens)
        elif type(module) is Upsample2D:
            forwards[module] = upsample_forward
    for module in forwards:
        if "forward" in vars(module):
            raise AdapterError(
                f"The forward of a {type(module).__name__} has been replaced already, by a hook or "
                "by low_memory itself. Undo that first."
            )
    # What others do to a single convolution, such as to cast its weights, is left alone.
    convolutions = (m for m in unet.modules() if by_rows(m) and "forward" not in vars(m))
    forwards.update(dict.fromkeys(convolutions, convolve))
    return LowMemory(unet, forwards)


def _with_tokens(tokens: int, block: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return transformer_block_forward(block, *args, tokens=tokens, **kwargs)


def one_at_a_time(unet: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The UNet's forward for each sample of the batch, without gradients."""
    for name in (
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "attention_mask",
    ):
        if kwargs.get(name) is not None:
            raise AdapterError(f"low_memory takes no {name}.")
    if torch.is_grad_enabled() and any(p.requires_grad for p in unet.parameters()):
        raise AdapterError("low_memory works in place and has no gradients. Use torch.no_grad().")
    return_dict = kwargs.pop("return_dict", True)
    batch = sample.shape[0]
    answers: Any = None
    for i in range(batch):

        def one(x: Any, i: int = i) -> Any:
            batched = isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == batch
            return x[i : i + 1] if batched else x

        own_args, own_kwargs = _pytree.tree_map(one, (args, kwargs))
        forward = type(unet).forward
        answer = forward(unet, sample[i : i + 1], *own_args, return_dict=False, **own_kwargs)[0]
        if answers is None:
            answers = answer.new_empty(batch, *answer.shape[1:])
        answers[i : i + 1] = answer
    return UNet2DConditionOutput(sample=answers) if return_dict else (answers,)

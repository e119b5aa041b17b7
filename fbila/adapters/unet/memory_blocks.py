"""How the blocks of a Stable Diffusion UNet run with little memory.

Each function stands for the forward of a class of diffusers, and computes the same. A block's input
belongs to whoever called it; what it made itself it may write over.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.linfusion import attend_in_chunks
from ...ops.group_norm_library import group_norm, group_norm_
from ...ops.memory_format import is_channels_last, order_of
from ..kernel_checks import plain, plain_norm, serves
from ..linfusion.attention import LinFusionAttention
from ..report import AdapterError

# Elements that the norms convert to float32 at a time.
_ELEMENTS = 2**26


def down_block_forward(
    block: Any, hidden_states: Tensor, temb: Tensor | None = None, **attention: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`CrossAttnDownBlock2D.forward` and `DownBlock2D.forward`; skip connections leave the GPU."""
    if attention.pop("additional_residuals", None) is not None:
        raise AdapterError("low_memory takes no additional residuals.")
    skips = []
    for i, resnet in enumerate(block.resnets):
        hidden_states = resnet_forward(resnet, [hidden_states], temb, own=False)
        if hasattr(block, "attentions"):
            hidden_states = block.attentions[i](hidden_states, return_dict=False, **attention)[0]
        skips.append(to_host(hidden_states))
    for downsampler in block.downsamplers or ():
        hidden_states = downsampler(hidden_states)
        skips.append(to_host(hidden_states))
    return hidden_states, tuple(skips)


def up_block_forward(
    block: Any,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: Any = None,
    **attention: Any,
) -> Tensor:
    """`CrossAttnUpBlock2D.forward` and `UpBlock2D.forward`; skip connections come back in turn."""
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise AdapterError("low_memory has no FreeU. Call disable_freeu() first.")
    skips = list(res_hidden_states_tuple)
    for i, resnet in enumerate(block.resnets):
        joined = [join(hidden_states, skips.pop())]
        hidden_states = hidden_states[:0]
        hidden_states = resnet_forward(resnet, joined, temb, own=True)
        if hasattr(block, "attentions"):
            hidden_states = block.attentions[i](hidden_states, return_dict=False, **attention)[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    return hidden_states


def join(hidden_states: Tensor, skip: Tensor) -> Tensor:
    """Both side by side along the channels; `skip` may be in the memory of the CPU."""
    B, C, H, W = hidden_states.shape
    joined = torch.empty(
        (B, C + skip.shape[1], H, W),
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        memory_format=order_of(hidden_states),
    )
    joined[:, :C] = hidden_states
    joined[:, C:].copy_(skip, non_blocking=True)
    return joined


def to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory of the CPU; x itself where it is there already."""
    if x.device.type == "cpu":
        return x
    kept = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return kept.copy_(x, non_blocking=True)


def resnet_forward(resnet: Any, holder: list[Tensor], temb: Tensor | None, *, own: bool) -> Tensor:
    """`ResnetBlock2D.forward` of the one tensor that `holder` holds, and which leaves it.

    own: Whether that may be written over.
    """
    x = holder.pop()
    plain = resnet.upsample is None and resnet.downsample is None
    if (
        not plain
        or resnet.time_embedding_norm != "default"
        or not isinstance(resnet.norm1, nn.GroupNorm)
    ):
        return resnet(x, temb)
    shortcut = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
    own = own and resnet.conv_shortcut is not None
    hidden = norm_and_activate(x, resnet.norm1, resnet.nonlinearity, own=own)
    del x
    hidden = resnet.conv1(hidden)
    if temb is not None and resnet.time_emb_proj is not None:
        embedded = temb if resnet.skip_time_act else resnet.nonlinearity(temb)
        hidden += resnet.time_emb_proj(embedded)[:, :, None, None]
    hidden = resnet.conv2(norm_and_activate(hidden, resnet.norm2, resnet.nonlinearity, own=True))
    hidden += shortcut
    return hidden if resnet.output_scale_factor == 1 else hidden.div_(resnet.output_scale_factor)


def norm_and_activate(x: Tensor, norm: nn.GroupNorm, activation: nn.Module, *, own: bool) -> Tensor:
    """activation(norm(x)), in the memory of x where it is our `own`."""
    kernel = serves(x, norm) and plain_norm(norm, nn.GroupNorm, x) and plain(activation, nn.SiLU)
    # In the memory of x there is no gradient.
    graph = torch.is_grad_enabled() and x.requires_grad
    if kernel and not graph and is_channels_last(x) is not None:
        parameters = norm.weight, norm.bias, norm.num_groups, norm.eps, True
        return group_norm_(x, *parameters) if own else group_norm(x, None, None, *parameters)
    return activate_(norm_(x, norm) if own else norm(x), activation)


def activate_(x: Tensor, activation: nn.Module) -> Tensor:
    return F.silu(x, inplace=True) if isinstance(activation, nn.SiLU) else activation(x)


def norm_(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm(x)` in the memory of x `(B, C, H, W)`, converted to float32 some rows at a time."""
    B, C, _, W = x.shape
    pieces = x.split(max(1, _ELEMENTS // (B * C * W)), 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, variance = statistics(pieces, norm.num_groups, wide)
    scale = (variance + norm.eps).rsqrt().repeat_interleave(C // norm.num_groups, 1)
    shift = -mean.repeat_interleave(C // norm.num_groups, 1) * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    scale, shift = scale.to(wide)[:, :, None, None], shift.to(wide)[:, :, None, None]
    for piece in pieces:
        piece.copy_(torch.addcmul(shift, piece.to(wide), scale))
    return x


def statistics(pieces: tuple[Tensor, ...], groups: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance `(B, groups)` of the pieces together, in float64.

    Those of each piece are merged by the formula of Chan, Golub and LeVeque, which does not cancel.
    """
    count, mean, variance = 0, torch.zeros(()), torch.zeros(())
    for piece in pieces:
        grouped = piece.to(wide).reshape(piece.shape[0], groups, -1)
        own_variance, own_mean = (y.double() for y in torch.var_mean(grouped, -1, correction=0))
        share = piece.shape[2] / (count + piece.shape[2])
        if count == 0:
            mean, variance = own_mean, own_variance
        else:
            apart = own_mean - mean
            mean = mean + share * apart
            variance = variance + share * (own_variance - variance + (1 - share) * apart**2)
        count += piece.shape[2]
    return mean, variance


def transformer_block_forward(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    *,
    tokens: int,
) -> Tensor:
    """`BasicTransformerBlock.forward` of a UNet, some tokens at a time and in place.

    The input is what `Transformer2DModel` has projected for its blocks alone.
    """
    kwargs = dict(cross_attention_kwargs or {})
    if kwargs.pop("gligen", None) is not None or block.pos_embed is not None:
        raise AdapterError("low_memory takes neither GLIGEN inputs nor positional embeddings.")
    if isinstance(block.attn1, LinFusionAttention) and not block.only_cross_attention:
        for place, attended in attend_in_chunks(block.attn1, block.norm1, hidden_states, tokens):
            place += attended
    else:
        keys = encoder_hidden_states if block.only_cross_attention else None
        hidden_states += block.attn1(
            block.norm1(hidden_states), encoder_hidden_states=keys, attention_mask=None, **kwargs
        )
    for place in hidden_states.split(tokens, 1):
        if block.attn2 is not None:
            place += block.attn2(
                block.norm2(place),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
        place += block.ff(block.norm3(place))
    return hidden_states

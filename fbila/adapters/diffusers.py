"""Finding attention in diffusers models: what is spatial self-attention, and what is not.

A module's name alone does not tell: `attn1` is temporal attention in motion modules and
cross-attention where a block has `only_cross_attention`. So each module is asked what it computes.
"""

from typing import Any

from torch import nn

from .host import host
from .processors import is_softmax
from .report import AdapterError, Entry, SwapReport
from .swap import unwrap

with host("diffusers"):
    from diffusers.models.attention_processor import Attention

_TEMPORAL_PARENTS = {
    "AnimateDiffTransformer3D",
    "TemporalBasicTransformerBlock",
    "TransformerTemporalModel",
}


def resolve_model(model: Any) -> nn.Module:
    """The UNet or transformer of a pipeline, or the module itself; behind `torch.compile`.

    Raises:
        AdapterError: If it is neither a module nor a pipeline with one.
    """
    found = model
    if not isinstance(model, nn.Module):
        found = getattr(model, "unet", None)
        if found is None:
            found = getattr(model, "transformer", None)
    if not isinstance(found, nn.Module):
        raise AdapterError(
            "Expected an nn.Module or a DiffusionPipeline with .unet or .transformer, "
            f"got {type(model).__name__}."
        )
    return unwrap(found)


def plan(model: Any, target: str = "LinFusionAttention") -> SwapReport:
    """Which attention modules LinFusion would replace, and why not the others; changes nothing.

    Args:
        model: A pipeline, or its UNet or transformer.
        target: Class that takes the place of the modules, for the report.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> report = plan(unet)
        >>> len(report.swapped), dict(report.reasons())
        (6, {'cross-attention': 6})
    """
    model = resolve_model(model)
    swapped: list[Entry] = []
    skipped: list[Entry] = []
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        reason = why_not(model, name)
        heads = module.heads
        entry = Entry(
            name=name,
            source=type(module).__name__,
            heads=heads,
            head_dim=module.inner_dim // heads,
            target="" if reason else target,
            reason=reason,
        )
        (skipped if reason else swapped).append(entry)
    return SwapReport(type(model).__name__, tuple(swapped), tuple(skipped))


def why_not(model: nn.Module, name: str) -> str:
    """Why an attention module of the model is no plain spatial self-attention; `""` if it is."""
    module = model.get_submodule(name)
    path = name.split(".")
    parents = {
        type(model.get_submodule(".".join(path[:depth]))).__name__ for depth in range(1, len(path))
    }
    # The first that holds is given, so the more telling come first.
    reasons = {
        "is linear attention already": hasattr(module, "to_q_"),
        "temporal attention": bool(parents & _TEMPORAL_PARENTS),
        "mixes text and image tokens in one softmax": module.added_kv_proj_dim is not None,
        "cross-attention": module.is_cross_attention,
        "is causal": getattr(module, "is_causal", False),
        "not named attn1": path[-1] != "attn1",
        "its query and key norms would be lost": getattr(module, "norm_q", None) is not None,
        "its group or spatial norm would be lost": module.group_norm is not None
        or module.spatial_norm is not None,
        "the bias of its projections would be lost": getattr(module.to_q, "bias", None) is not None,
        "its residual connection would be lost": module.residual_connection
        or module.rescale_output_factor != 1,
        "its projections are not square": not (
            module.query_dim == module.inner_dim == module.inner_kv_dim == module.out_dim
        ),
        f"runs {type(module.processor).__name__}, which linear attention would ignore": (
            not is_softmax(module.processor)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")

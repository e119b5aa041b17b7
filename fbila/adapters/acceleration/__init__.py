"""Models whose attention is linear already, with the same weights and the same output, faster.

    with accelerate(pipeline.transformer), accelerate(pipeline.vae):
        image = pipeline(prompt).images[0]

Modules are replaced by ones of a subclass that share all they hold and have another forward.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...ops.tensor_checks import MAX_HEAD_DIM
from ..report import AdapterError, Entry, SwapReport, require_match
from ..selection import Selection, Selector
from ..shared import over, replacements, why_not_replaced
from ..swap import SwapHandle, swap_modules, unwrap

# Where a host has a linear attention, or the layer after it, and what computes that here. A model
# with one has imported it.
_FAST = (
    ("diffusers.models.attention_processor", "sana", "FastSanaAttention"),
    (
        "diffusers.models.transformers.transformer_sana_video",
        "sana_video",
        "FastSanaVideoAttention",
    ),
    ("diffusers.models.attention_processor", "dc_ae", "FastMultiscaleAttention"),
    ("diffusers.models.transformers.sana_transformer", "glumb_conv", "FastGLUMBConv"),
    (
        "diffusers.models.transformers.transformer_sana_video",
        "glumb_temp_conv",
        "FastGLUMBTempConv",
    ),
    ("timm.models.efficientvit_mit", "lite_mla", "FastLiteMLA"),
    ("timm.models.coat", "coat", "FastFactorAttention"),
)


def accelerate(
    model: nn.Module, *, include: Selector | None = None, exclude: Selector | None = None
) -> SwapHandle:
    """Runs the linear attention of a diffusers or timm model by fbila's kernels, reversibly.

    That of diffusers' Sana, Sana-Sprint, SanaControlNet, SanaVideo and `AutoencoderDC` (DC-AE), of
    timm's EfficientViT (`efficientvit_*` of MIT: `LiteMLA`) and CoaT. The weights are the model's
    own and the mathematics too: the output is that of the stock model in float32, of which half
    precision no longer makes copies. Gradients flow as before.

    With diffusers' come their feed-forward layers (`GLUMBConv`), on a GPU, and their norms, on a
    GPU and where no gradient is wanted; elsewhere these run their stock forward.

    Everything is checked before anything is changed.

    Args:
        model: The transformer, ControlNet, autoencoder or backbone; also behind `torch.compile`.
        include, exclude: Which modules by name: a regular expression for the whole name, a list of
            names or their last parts, or a function of name and module.

    Returns:
        The handle, which undoes it; also a context manager. Its `report` says what was replaced,
        what was not, and why.

    Raises:
        AdapterError: If there is nothing to accelerate, or the model carries a swap already, or is
            no module. The model is as it was.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("efficientvit_b0").eval()
        >>> x = torch.randn(1, 3, 224, 224)
        >>> stock = model(x)
        >>> with accelerate(model) as handle:
        ...     print(len(handle.report.swapped), torch.allclose(model(x), stock, atol=1e-4))
        4 True
        >>> torch.equal(model(x), stock)
        True
    """
    report = plan(model, include=include, exclude=exclude)
    require_match(report, "fbila.adapters.acceleration.plan")
    model = unwrap(model)
    names = [entry.name for entry in report.swapped]
    modules = replacements(model, names, lambda _, module: over(module, _choose(module)[0]))
    return swap_modules(model, modules, report)


def plan(
    model: nn.Module, *, include: Selector | None = None, exclude: Selector | None = None
) -> SwapReport:
    """What `accelerate` with the same arguments would replace, and why not the rest.

    Raises:
        AdapterError: If the model is no module.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", device="meta")
        >>> plan(model).reasons().most_common()
        [('is not a linear attention that there are kernels for', 6)]
    """
    if not isinstance(model, nn.Module):
        parts = getattr(model, "components", None)
        hint = ""
        if isinstance(parts, dict):
            names = [name for name, part in parts.items() if isinstance(part, nn.Module)]
            hint = f" Its models are accelerated one by one: {', '.join(names)}."
        raise AdapterError(f"Expected an nn.Module, got {type(model).__name__}.{hint}")
    model = unwrap(model)
    found = list(_entries(model, Selection(include, exclude)))
    return SwapReport(
        type(model).__name__,
        tuple(entry for entry in found if not entry.reason),
        tuple(entry for entry in found if entry.reason),
    )


def _entries(model: nn.Module, selection: Selection) -> Iterator[Entry]:
    for name, module in model.named_modules(remove_duplicate=False):
        kind, reason = _choose(module)
        if kind is None and not reason:
            continue
        heads, head_dim = (0, 0) if kind is None else kind.shape(module)
        reason = reason or why_not_replaced(name, module)
        if not reason and head_dim > MAX_HEAD_DIM:
            reason = f"has {head_dim} channels a head, more than {MAX_HEAD_DIM}"
        reason = reason or selection.why_not(name, module)
        yield Entry(
            name=name,
            source=type(module).__name__,
            heads=heads,
            head_dim=head_dim,
            target="" if reason or kind is None else kind.__name__,
            reason=reason,
        )


def _choose(module: nn.Module) -> tuple[Any, str]:
    """(what computes the module, "") or (None, why nothing does); no reason for no attention."""
    fast = _fast_classes()
    if type(module) in fast:
        return None, "is accelerated already"
    reason = ""
    for kind in fast:
        # Not subclasses of the host's, which may compute anything.
        if type(module) is kind.__base__:
            reason = kind.why_not(module)
            if not reason:
                return kind, ""
    if not reason and type(module).__name__.endswith(("Attention", "Attn")):
        reason = "is not a linear attention that there are kernels for"
    return None, reason


def _fast_classes() -> list[Any]:
    """Those whose host is imported."""
    return [
        getattr(importlib.import_module(f".{file}", __package__), name)
        for place, file, name in _FAST
        if place in sys.modules
    ]

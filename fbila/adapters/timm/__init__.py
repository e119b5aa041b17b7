"""Linear attention in timm's backbones, put in and out in one line.

    handle = swap(model)              # every Attention, AttentionRope and EvaAttention
    with handle.disabled(): ...       # the softmax model, bit for bit
    handle.unmount()                  # the same modules again

or from the start, `timm.create_model(..., attn_layer=LinearAttention)`. docs/hosts.md has the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ...ops.feature_maps import FEATURE_MAPS
from ..host import host
from ..report import AdapterError, SwapReport, require_match
from ..selection import Selection, Selector
from ..shared import over, replacements
from ..swap import SwapHandle, get_handle, swap_modules, unwrap
from .attention import LINEAR, LinearAttention, warn_of_dropout
from .found import Choice, find, settings_of, spec_of
from .own_layer import AttentionSpec, make_layer

with host("timm"):
    from timm.models import vision_transformer

__all__ = ["AttentionSpec", "LinearAttention", "plan", "register", "swap"]


def swap(
    model: nn.Module,
    attention: Choice = "elu1",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    layers: Sequence[int] | None = None,
    min_tokens: int = 0,
) -> SwapHandle:
    """Puts linear attention in the place of a timm model's softmax attention, reversibly.

    Everything is checked before anything is changed.

    Args:
        model: A timm model, or any module with such attention in it; also behind `torch.compile`.
        attention: What takes its place. The name of a feature map (as in `fbila.linear_attn`):
            linear attention by the module's own projections, norms, gate and rotary embedding,
            without parameters of its own. A layer class, `fbila.layers.LinearAttention` for one:
            called with the channels, `num_heads` and, if it takes them, `qkv_bias`, `grid_size`
            and `num_prefix_tokens`. A factory: given an `AttentionSpec`, it returns a layer
            `(B, N, C)` to `(B, N, C)`. Layers over grids and pictures fit in either way, where the
            model's patches, or else all its tokens as a square, are the grid.
        include, exclude: Which modules by name: a regular expression for the whole name, a list of
            names or their last parts, or a function of name and module.
        layers: Numbers of modules among those that are left then, negative ones from the end.
        min_tokens: Shorter sequences go through the model's own softmax; with a feature map only.

    Returns:
        The handle, which undoes it. Its `report` says what was replaced.

    Raises:
        AdapterError: If nothing can be replaced, or the model carries a swap already, or an
            argument does not fit. The model is as it was.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.randn(1, 3, 160, 160)
        >>> softmax = model(x)
        >>> with swap(model, exclude="blocks[.]0[.].*") as handle:
        ...     print(len(handle.report.swapped), len(handle.report.skipped))
        ...     linear = model(x)
        5 1
        >>> torch.equal(model(x), softmax), torch.equal(linear, softmax)
        (True, False)
    """
    report = plan(model, attention, include=include, exclude=exclude, layers=layers)
    model = unwrap(model)
    if get_handle(model) is not None:
        raise AdapterError(
            f"{type(model).__name__} carries a swap already. Undo it first: handle.unmount(), or "
            "fbila.adapters.unswap(model)."
        )
    require_match(report, "fbila.adapters.timm.plan")
    names = [entry.name for entry in report.swapped]
    if not isinstance(attention, str):
        if min_tokens:
            raise AdapterError(
                f"min_tokens={min_tokens} is for attention with the model's own weights, by the "
                f"name of a feature map. {report.swapped[0].target} has others, not for softmax."
            )
        modules = replacements(
            model, names, lambda name, _: make_layer(spec_of(model, name), attention)
        )
        return swap_modules(model, modules, _sized(report, model, modules), settings_of(model))
    options = {"feature_map": attention, "min_tokens": min_tokens}
    modules = replacements(
        model,
        names,
        lambda name, module: over(module, LINEAR[type(module)], name=name, **options),
    )
    warn_of_dropout(next(iter(modules.values())))
    return swap_modules(model, modules, report, settings_of(model))


def plan(
    model: nn.Module,
    attention: Choice = "elu1",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    layers: Sequence[int] | None = None,
) -> SwapReport:
    """What `swap` with the same arguments would replace, and why not the rest; changes nothing.

    Raises:
        AdapterError: If the model is no module, `attention` is no feature map, class or function,
            or `layers` asks for more than there are.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_huge_patch14_xp_224", device="meta")
        >>> plan(model).reasons().most_common()
        [('computes attention within the block, where there is no module to replace', 32)]
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"Expected an nn.Module, got {type(model).__name__}.")
    if not callable(attention) and (attention is None or attention not in FEATURE_MAPS):
        names = ", ".join(repr(name) for name in FEATURE_MAPS if name)
        raise AdapterError(
            f"attention must be a layer class, a factory or one of {names}, got {attention!r}."
        )
    return find(unwrap(model), attention, Selection(include, exclude, layers))


def register(name: str = "fbila", layer: type[nn.Module] = LinearAttention) -> None:
    """Makes timm know a layer by name: `attn_layer="fbila"`, as on the command line of a script.

    Importing fbila does not; every process that makes such models has to call this.

    Args:
        name: What `timm.create_model(..., attn_layer=name)` is to find it by.
        layer: `LinearAttention`, or a subclass with another feature map.

    Raises:
        AdapterError: If the name is another layer's, or timm keeps no names of layers any more.

    Example:
        >>> import timm
        >>> register()
        >>> model = timm.create_model("test_vit", attn_layer="fbila")
        >>> type(model.blocks[0].attn).__name__
        'LinearAttention'
    """
    known = getattr(vision_transformer, "ATTN_LAYERS", None)
    if known is None:
        raise AdapterError(
            "This timm has moved its names of attention layers (ATTN_LAYERS). Pass the class: "
            f"attn_layer={layer.__name__}."
        )
    if known.get(name, layer) is not layer:
        raise AdapterError(
            f"{name!r} is the name of {known[name].__name__} in timm; choose another one."
        )
    known[name] = layer


def _sized(report: SwapReport, model: nn.Module, modules: Mapping[str, nn.Module]) -> SwapReport:
    """The report with what weights of their own add, and what the originals keep."""
    kept = added = 0
    for name, module in modules.items():
        for p in model.get_submodule(name).parameters():
            kept += p.numel() * p.element_size()
            added -= p.numel()
        added += sum(p.numel() for p in module.parameters())
    return replace(report, added_parameters=added, kept_bytes=kept)

"""Finding attention in timm models: what can be replaced, by what, and why not the rest."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...ops.feature_maps import feature_dim
from ...ops.tensor_checks import MAX_HEAD_DIM
from ..report import Entry, SwapReport
from ..selection import Selection
from ..shared import why_not_replaced
from .attention import LINEAR, TakesRope
from .classes import why_not_of_class
from .own_layer import AttentionSpec, OwnLayer

# The name of a feature map, a layer class, or what makes a layer for a place.
Choice = str | type[nn.Module] | Callable[[AttentionSpec], nn.Module]


def find(model: nn.Module, attention: Choice, selection: Selection) -> SwapReport:
    """The attention modules of a model, each with what takes its place or why nothing does."""
    found = list(_entries(model, attention, selection))
    left = [number for number, entry in enumerate(found) if not entry.reason]
    chosen = selection.numbers(len(left))
    for position, number in enumerate(left):
        if position not in chosen:
            why = f"not among layers={list(selection.layers or ())}"
            found[number] = replace(found[number], target="", reason=why)
    return SwapReport(
        type(model).__name__,
        tuple(entry for entry in found if not entry.reason),
        tuple(entry for entry in found if entry.reason),
    )


def spec_of(model: nn.Module, name: str) -> AttentionSpec:
    """What a factory is told about the module `name`."""
    module: Any = model.get_submodule(name)
    first = module.q_proj if module.qkv is None else module.qkv
    # Models keep what makes the embedding beside their blocks; some have the classes without it.
    rope = any(getattr(parent, "rope", None) is not None for parent in model.modules())
    return AttentionSpec(
        name=name,
        dim=first.in_features,
        out_dim=module.proj.out_features,
        heads=module.num_heads,
        kv_heads=getattr(module, "num_kv_heads", module.num_heads),
        head_dim=module.head_dim,
        qkv_bias=first.bias is not None or getattr(module, "q_bias", None) is not None,
        qk_norm=not isinstance(module.q_norm, nn.Identity),
        scale_norm=not isinstance(module.norm, nn.Identity),
        gated=module.gate is not None,
        rope=rope and issubclass(LINEAR[type(module)], TakesRope),
        num_prefix_tokens=getattr(
            module, "num_prefix_tokens", getattr(model, "num_prefix_tokens", 0)
        ),
        grid_size=_pair(getattr(getattr(model, "patch_embed", None), "grid_size", None)),
        module=module,
    )


def settings_of(model: nn.Module) -> dict[str, bool]:
    """What a model must be told for as long as its attention is linear, by path.

    NaFlexVit's mask hides the queries of padding as well as its keys, unless told otherwise.
    """
    wanted = "use_key_only_attn_mask"
    return {
        f"{name}.{wanted}".lstrip("."): True
        for name, module in model.named_modules()
        if getattr(module, wanted, True) is False
    }


def _pair(size: Any) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))


def _entries(model: nn.Module, attention: Choice, selection: Selection) -> Iterator[Entry]:
    # A module that is in several places is replaced in each of them.
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in LINEAR:
            reason = _why_not(model, name, attention) or selection.why_not(name, module)
        elif isinstance(module, (*LINEAR.values(), OwnLayer)):
            reason = "is linear attention already"
        else:
            reason = why_not_of_class(module)
        if not reason and type(module) not in LINEAR:
            continue
        heads, head_dim = (getattr(module, size, 0) for size in ("num_heads", "head_dim"))
        yield Entry(
            name=name,
            source=type(module).__name__,
            heads=heads if isinstance(heads, int) else 0,
            head_dim=head_dim if isinstance(head_dim, int) else 0,
            target="" if reason else _target(module, attention),
            reason=reason,
        )


def _why_not(model: nn.Module, name: str, attention: Choice) -> str:
    """Why a module of a class that can be replaced is not."""
    module: Any = model.get_submodule(name)
    reason = why_not_replaced(name, module)
    if reason:
        return reason
    if isinstance(attention, type):
        return spec_of(model, name).why_not_plain()
    if not isinstance(attention, str):
        return ""
    features = feature_dim(module.head_dim, attention)
    if features > MAX_HEAD_DIM:
        return f"has {features} features a head, more than {MAX_HEAD_DIM}"
    if features != module.head_dim and spec_of(model, name).rope:
        return f"has a rotary position embedding, which the features of {attention!r} do not fit"
    return ""


def _target(module: nn.Module, attention: Choice) -> str:
    if isinstance(attention, str):
        return LINEAR[type(module)].__name__
    return getattr(attention, "__name__", type(attention).__name__)

"""What diffusers and accelerate hook onto a model: layerwise casting and offloading.

diffusers is looked for among the modules that are imported already.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .lora import own_parameters, tuners
from .walk import every

_CASTING = "layerwise_casting"
_OFFLOADING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a module computes in, by its first parameter."""
    parameter = next(module.parameters())
    hook = casting(module)
    return parameter.device, parameter.dtype if hook is None else hook.compute_dtype


def casting(module: nn.Module) -> Any:
    """The hook of layerwise casting on a layer of the module, if any."""
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook(_CASTING) if registry is not None else None
        if hook is not None:
            return hook
    return None


def carry_casting(leaving: nn.Module, coming: nn.Module) -> None:
    """Stores the weights of `coming` as those of `leaving` are stored."""
    hook = casting(leaving)
    if hook is None:
        return
    from diffusers.hooks.layerwise_casting import (
        _disable_peft_input_autocast,
        apply_layerwise_casting_hook,
    )

    own = {id(p) for p in own_parameters(coming)}
    for child in coming.modules():
        # As diffusers does, not the LoRAs.
        if isinstance(child, nn.Linear) and id(child.weight) in own and casting(child) is None:
            apply_layerwise_casting_hook(
                child, hook.storage_dtype, hook.compute_dtype, hook.non_blocking
            )
    for tuner in tuners(coming).values():
        if not hasattr(tuner, "_diffusers_hook"):
            _disable_peft_input_autocast(tuner)


@contextmanager
def offloading_put_on_again(model: nn.Module) -> Iterator[None]:
    """Takes diffusers' group offloading off a model for the block, which changes its modules."""
    offloading: Any = sys.modules.get("diffusers.hooks.group_offloading")
    hook = offloading and offloading._get_top_level_group_offload_hook(model)
    if not hook:
        yield
        return
    registry = offloading.HookRegistry.check_if_exists_or_initialize(model)
    for name in _OFFLOADING:
        registry.remove_hook(name, recurse=True)
    try:
        yield
    finally:
        offloading._apply_group_offloading(model, hook.config)


def offloaded(module: nn.Module) -> bool:
    """Whether layers of the module are moved to the GPU for their turn by diffusers."""
    registries = (getattr(child, "_diffusers_hook", None) for child in module.modules())
    return any(r is not None and r.get_hook("group_offloading") for r in registries)


def hooked(module: nn.Module, name: str) -> bool:
    """Whether the module, or one in it, has an attribute of this name: a hook."""
    return any(name in child.__dict__ for child in every(module))


def foreign_hooks(module: nn.Module) -> list[str]:
    """The hooks of diffusers on the module and in it that are not dealt with here."""
    registries = (getattr(child, "_diffusers_hook", None) for child in module.modules())
    hooks = {name for registry in registries if registry is not None for name in registry.hooks}
    return sorted(hooks - {_CASTING, *_OFFLOADING, "peft_autocast_disable"})

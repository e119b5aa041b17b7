"""LoRAs on the layers of a module, for one that takes its place.

Both have layers of peft's around their own, which share the very same adapters: loading, deleting,
scaling and training one is doing it to the other. What peft keeps on each layer (which adapters are
active, disabled, fused) is matched when the modules change places.

peft is looked for among the modules that are imported already: where it is not, there is no LoRA.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .walk import every

# The tuner layer that shares its adapters with this one, on the other module of the same place.
_TWIN = "_fbila_twin"


def is_tuner(module: nn.Module | None) -> bool:
    """Whether a module is a layer of peft's: a LoRA around a `base_layer`."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def has_tuner(module: nn.Module) -> bool:
    """Whether there are any `tuners`, found out quickly."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and any(
        isinstance(child, peft.BaseTunerLayer) for child in every(module)
    )


def tuners(module: nn.Module) -> dict[str, Any]:
    """The outermost tuner layers in a module, by their path."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        if is_tuner(child) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = child
    return found


def plain(linear: Any) -> nn.Module:
    """The layer itself, behind a LoRA."""
    return linear.get_base_layer() if is_tuner(linear) else linear


def can_carry(tuner: Any) -> bool:
    """Whether a layer like this one can be put around another: a LoRA on a plain linear layer."""
    kind = sys.modules["peft.tuners.lora.layer"].Linear
    return type(tuner) is kind and type(tuner.base_layer) is nn.Linear


@torch.no_grad()
def unfused(linear: Any) -> nn.Module:
    """The layer itself; a copy of it without the LoRAs that are fused into it, if there are any."""
    layer = plain(linear)
    if is_tuner(linear) and linear.merged_adapters:
        layer = copy.deepcopy(layer)
        for adapter in linear.merged_adapters:
            layer.weight -= linear.get_delta_weight(adapter).to(layer.weight)
    return layer


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module without those of LoRAs on it."""
    theirs = {
        id(p)
        for tuner in tuners(module).values()
        for p in tuner.parameters()
        if all(p is not q for q in plain(tuner).parameters())
    }
    return [p for p in module.parameters() if id(p) not in theirs]


@contextmanager
def without_tuners(module: nn.Module) -> Iterator[None]:
    """Runs the block with the layers alone, without the LoRAs around them."""
    found = tuners(module)
    for name, tuner in found.items():
        _set(module, name, plain(tuner))
    try:
        yield
    finally:
        for name, tuner in found.items():
            _set(module, name, tuner)


def carry_tuners(leaving: nn.Module, coming: nn.Module) -> None:
    """Puts the LoRAs that `leaving` has on `coming`, and takes off those that it has no more."""
    worn, stale = tuners(leaving), tuners(coming)
    there = dict(coming.named_modules())
    for name in {**worn, **stale}:
        target = there.get(name)
        if name in worn and target is not None:
            twin = vars(worn[name]).get(_TWIN)
            if twin is None or twin is not target:
                twin = _make_twin(worn[name], plain(target))
                _set(coming, name, twin)
            _match(worn[name], twin)
        elif name in stale and name in dict(leaving.named_modules()):
            # Taken off while the other module was in the model, fused or not.
            twin = vars(stale[name]).get(_TWIN)
            if twin is not None:
                _match(twin, stale[name])
            _set(coming, name, plain(target))


def _make_twin(tuner: Any, base: nn.Module) -> Any:
    """A tuner layer around `base` with the adapters of another one: the very same modules."""
    twin = copy.copy(tuner)
    state = vars(twin)
    for key in ("_modules", "_parameters", "_buffers"):
        state[key] = dict(state[key])
    for key in [k for k in state if k.endswith("_hooks")]:
        state[key] = type(state[key])()
    # Of diffusers' hooks, which are bound to the other layer.
    for key in ("forward", "_diffusers_hook"):
        state.pop(key, None)
    state["_modules"]["base_layer"] = base
    state["merged_adapters"] = []
    state["_caches"] = {}
    vars(tuner)[_TWIN], state[_TWIN] = twin, tuner
    return twin


def _match(tuner: Any, twin: Any) -> None:
    """What peft keeps on each layer, and does not change in place."""
    active = tuner._active_adapter
    twin._active_adapter = list(active) if isinstance(active, list) else active
    twin._disable_adapters = tuner._disable_adapters
    if twin.merged_adapters != tuner.merged_adapters:
        if twin.merged_adapters:
            twin.unmerge()
        if tuner.merged_adapters:
            twin.merge(adapter_names=list(tuner.merged_adapters))


def _set(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    holder: Any = module.get_submodule(parent)
    # As with setattr, but also for the places of a ModuleList.
    holder._modules[last] = child

"""What others have put on a module goes over to the one that takes its place.

A LoRA, layerwise casting, group offloading and a processor that was set belong to the place in the
model, not to the module that happens to be there: whichever it is, it is as if they had been put on
that one, and what was taken off is off both.
"""

from torch import nn

from .hooks import carry_casting, foreign_hooks
from .lora import can_carry, carry_tuners, tuners
from .processors import carry_processor
from .report import AdapterError


def carry(leaving: nn.Module, coming: nn.Module) -> None:
    """Puts on `coming` what `leaving` has on, and takes off what it has no more."""
    carry_tuners(leaving, coming)
    carry_casting(leaving, coming)
    carry_processor(leaving, coming)


def require_carriable(name: str, module: nn.Module) -> None:
    """Refuses a module that has something on that would be lost.

    Raises:
        AdapterError: If it has.
    """
    if any(t.device.type == "meta" for t in (*module.parameters(), *module.buffers())):
        raise AdapterError(
            f"The model is under sequential CPU offload ({name} is elsewhere); a module in its "
            "place would have no offload hooks. Mount and unmount before "
            "enable_sequential_cpu_offload(), or after pipeline.remove_all_hooks()."
        )
    for hook in foreign_hooks(module):
        raise AdapterError(
            f"{name} carries the hook {hook!r} of diffusers, which a module in its place would not "
            "have. Remove it first, and put it on again afterwards."
        )
    for child, tuner in tuners(module).items():
        if not can_carry(tuner):
            raise AdapterError(
                f"{name}.{child} carries a {type(tuner).__name__} of "
                f"{type(tuner.base_layer).__name__} ({type(tuner).__module__}), which cannot be "
                "put on another layer. Call pipeline.unload_lora_weights(), mount LinFusion, then "
                "load it again."
            )

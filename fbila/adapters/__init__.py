"""Putting fbila's layers into other people's models, and taking them out again.

Whatever touches a host library is imported on first use, so that this package can be imported
without one.
"""

from typing import TYPE_CHECKING, Any

from .report import AdapterError, Entry, LayerDrift, SwapReport
from .swap import SwapHandle, get_handle, unswap

if TYPE_CHECKING:
    from .acceleration import accelerate
    from .diffusers import plan
    from .linfusion import LinFusion
    from .unet.blocks import fused_blocks
    from .unet.memory import low_memory

__all__ = [
    "AdapterError",
    "Entry",
    "LayerDrift",
    "LinFusion",
    "SwapHandle",
    "SwapReport",
    "accelerate",
    "fused_blocks",
    "get_handle",
    "low_memory",
    "plan",
    "unswap",
]


def __getattr__(name: str) -> Any:
    if name == "LinFusion":
        from .linfusion import LinFusion

        return LinFusion
    if name == "accelerate":
        from .acceleration import accelerate

        return accelerate
    if name == "fused_blocks":
        from .unet.blocks import fused_blocks

        return fused_blocks
    if name == "low_memory":
        from .unet.memory import low_memory

        return low_memory
    if name == "plan":
        from .diffusers import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

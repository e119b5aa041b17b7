"""Flash bidirectional linear attention for vision and diffusion models."""

from typing import TYPE_CHECKING, Any

from .ops import (
    Rotary,
    State,
    focused_la,
    linear_attn,
    linear_attn_apply,
    linear_attn_state,
    simple_la,
)

if TYPE_CHECKING:
    from .adapters.acceleration import accelerate
    from .adapters.linfusion import LinFusion

__version__ = "0.1.0"
__all__ = [
    "LinFusion",
    "Rotary",
    "State",
    "__version__",
    "accelerate",
    "focused_la",
    "linear_attn",
    "linear_attn_apply",
    "linear_attn_state",
    "simple_la",
]


def __getattr__(name: str) -> Any:
    # LinFusion stands on diffusers, whose import takes seconds and which need not be installed.
    if name == "LinFusion":
        from .adapters.linfusion import LinFusion

        return LinFusion
    if name == "accelerate":
        from .adapters.acceleration import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Which attention processors of diffusers compute plain softmax self-attention.

They are told by the name of their class: plugins bring classes of their own under the same names.
"""

from typing import Any

from torch import nn

# A module that was told to use one of them can be linear instead; anything else (PAG, custom
# diffusion, Sana) means another computation.
_SOFTMAX = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}


def is_softmax(processor: Any) -> bool:
    return type(processor).__name__ in _SOFTMAX


def carry_processor(leaving: nn.Module, coming: nn.Module) -> None:
    """Sets on `coming` the processor that `leaving` was told to use, if it is a softmax one."""
    processor = getattr(leaving, "processor", None)
    if not is_softmax(processor) or not hasattr(coming, "set_processor"):
        return
    if type(processor).__name__ == "FusedAttnProcessor2_0" and not hasattr(coming, "to_qkv"):
        coming.fuse_projections()  # type: ignore[operator]
    coming.set_processor(processor)  # type: ignore[operator]

"""Token mixers as `nn.Module`s: one published method a file."""

from .focused import FocusedLinearAttention
from .linear_attention import LinearAttention
from .linfusion import GeneralizedLinearAttention
from .mlla import MLLALinearAttention
from .polaformer import PolaLinearAttention

__all__ = [
    "FocusedLinearAttention",
    "GeneralizedLinearAttention",
    "LinearAttention",
    "MLLALinearAttention",
    "PolaLinearAttention",
]

"""Token mixers as `nn.Module`s: one published method a file."""

from .focused import FocusedLinearAttention
from .inline import InLineAttention
from .linear_attention import LinearAttention
from .linfusion import GeneralizedLinearAttention
from .lite_mla import LiteMLA
from .mala import MALA
from .mlla import MLLALinearAttention
from .polaformer import PolaLinearAttention
from .polaformer_pp import PolaPPAttention
from .rala import RALA
from .sana import SanaLinearAttention
from .vssd import NonCausalSSD

__all__ = [
    "MALA",
    "RALA",
    "FocusedLinearAttention",
    "GeneralizedLinearAttention",
    "InLineAttention",
    "LinearAttention",
    "LiteMLA",
    "MLLALinearAttention",
    "NonCausalSSD",
    "PolaLinearAttention",
    "PolaPPAttention",
    "SanaLinearAttention",
]

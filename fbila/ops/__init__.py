"""Bidirectional linear attention on tensors: public functions over Triton kernels."""

from .functional import focused_la, linear_attn, simple_la
from .halves import linear_attn_apply, linear_attn_state
from .rotary import Rotary
from .state import State

__all__ = [
    "Rotary",
    "State",
    "focused_la",
    "linear_attn",
    "linear_attn_apply",
    "linear_attn_state",
    "simple_la",
]

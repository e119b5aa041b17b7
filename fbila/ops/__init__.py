"""Bidirectional linear attention on tensors: public functions over Triton kernels."""

from .functional import linear_attn, simple_la

__all__ = ["linear_attn", "simple_la"]

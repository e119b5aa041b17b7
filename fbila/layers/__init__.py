"""Token mixers as `nn.Module`s: one published method a file."""

from .linear_attention import LinearAttention
from .linfusion import GeneralizedLinearAttention

__all__ = ["GeneralizedLinearAttention", "LinearAttention"]

"""The factorised attention of timm's CoaT, by fbila's kernels.

    o_i = D^-0.5 q_i sum_j softmax_j(k_j)^T v_j + crpe(q, v)_i          x, y: `(B, N, C)`

The softmax is over the tokens, in each channel for itself, and so no map of pairs of tokens.
"""

from typing import Any

from torch import Tensor

from ...ops import simple_la
from ..host import host

with host("timm"):
    from timm.models.coat import FactorAttnConvRelPosEnc


class FastFactorAttention(FactorAttnConvRelPosEnc):
    """timm's `FactorAttnConvRelPosEnc` with its two products as one operator."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mixes the tokens of `x` `(B, 1 + height * width, C)`, `size` being height and width."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        assert self.crpe is not None
        mixed = simple_la(q, k.softmax(dim=2), v, scale=self.scale) + self.crpe(q, v, size=size)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    @staticmethod
    def why_not(module: Any) -> str:
        """Always `""`: there is one way to make this class."""
        return ""

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        """Heads and their channels."""
        return module.num_heads, module.proj.in_features // module.num_heads

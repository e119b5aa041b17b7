"""The feed-forward layer of diffusers' Sana and DC-AE, by fbila's kernels.

    y = norm((a SiLU(g)) W_2) + x,   [a, g] = dwconv(SiLU(x W_1 + b_1)) + b

x and y are `(B, C, height, width)`, in channels_last y always. The norm and x at the end are
DC-AE's alone.
"""

from typing import Any

from torch import Tensor

from ..host import host
from .gated_convolutions import feed_forward, serves_feed_forward, why_not_convolutions
from .inference import normalize

with host("diffusers"):
    from diffusers.models.transformers.sana_transformer import GLUMBConv


class FastGLUMBConv(GLUMBConv):
    """diffusers' `GLUMBConv`; its stock forward where the kernels cannot run, and in graphs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the channels of `hidden_states` `(B, C, height, width)`, and neighbours."""
        if hidden_states.ndim != 4 or not serves_feed_forward(self, hidden_states):
            return super().forward(hidden_states)
        x = hidden_states.permute(0, 2, 3, 1).contiguous()
        y = feed_forward(self, x)
        if self.norm_type == "rms_norm":
            y = normalize(self.norm, y)
        if self.residual_connection:
            y = y + x
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def why_not(module: Any) -> str:
        """Why one of the class is none that this computes; `""` if it is one."""
        return why_not_convolutions(module)

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        """It has no heads."""
        return 0, 0

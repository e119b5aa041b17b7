"""The feed-forward layer of diffusers' SanaVideo, by fbila's kernels.

    z = (a SiLU(g)) W_2,   [a, g] = dwconv(SiLU(x W_1 + b_1)) + b           of each frame
    y = z + conv(z)                                                         over three frames

x and y are `(B, frames, height, width, C)`.
"""

from typing import Any

from torch import Tensor

from ..host import host
from .gated_convolutions import feed_forward, serves_feed_forward, why_not_convolutions
from .glumb_conv import FastGLUMBConv

with host("diffusers"):
    from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv


class FastGLUMBTempConv(GLUMBTempConv):
    """diffusers' `GLUMBTempConv`; its stock forward where the kernels cannot run, and in graphs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the channels of `hidden_states` `(B, frames, height, width, C)`, and neighbours."""
        if not serves_feed_forward(self, hidden_states):
            return super().forward(hidden_states)
        size = hidden_states.shape[1:4]
        z = feed_forward(self, hidden_states.flatten(0, 1).contiguous())
        # A picture in channels_last with a row for each frame.
        rows = z.unflatten(0, (-1, size[0])).flatten(2, 3).permute(0, 3, 1, 2)
        y = (rows + self.conv_temp(rows)).permute(0, 2, 3, 1).unflatten(2, size[1:])
        return y + hidden_states if self.residual_connection else y

    @staticmethod
    def why_not(module: Any) -> str:
        """Why one of the class is none that this computes; `""` if it is one."""
        if module.norm_type is not None:
            return "has a norm, which goes over the frames in stock"
        return why_not_convolutions(module)

    shape = staticmethod(FastGLUMBConv.shape)

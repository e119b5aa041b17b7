"""The multi-scale linear attention of diffusers' `AutoencoderDC`, by fbila's kernels.

    t_0 = [x W_q, x W_k, x W_v]         t_s = W_s dwconv_s(t_0), a scale more for each s
    y   = norm(W_o [relu_attention(heads of t_0), relu_attention(heads of t_s), ...]) + x

x and y are `(B, C, height, width)`. The heads of each scale are attended to by themselves, so that
nothing of the size of all of them is put together but the output.
"""

from typing import Any

from torch import Tensor

from ..host import host
from .aggregation import aggregate
from .inference import normalize
from .projections import concatenated
from .relu_attention import attend_picture, join_heads, why_not_relu
from .sana import why_not_processor

with host("diffusers"):
    from diffusers.models.attention_processor import (
        SanaMultiscaleAttentionProjection,
        SanaMultiscaleAttnProcessor2_0,
        SanaMultiscaleLinearAttention,
    )


class FastMultiscaleAttention(SanaMultiscaleLinearAttention):
    """What `SanaMultiscaleAttnProcessor2_0` computes; other processors are left to run."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the positions of `hidden_states` `(B, C, height, width)`."""
        height, width = hidden_states.shape[-2:]
        # With as few positions stock attention is quadratic, which divides at another place.
        quadratic = height * width <= self.attention_head_dim
        if type(self.processor) is not SanaMultiscaleAttnProcessor2_0 or quadratic:
            return super().forward(hidden_states)
        # Once, and not by each of the projections.
        x = hidden_states.movedim(1, -1).contiguous()
        qkv = concatenated([self.to_q, self.to_k, self.to_v], x).movedim(-1, 1)
        scales = [
            qkv,
            *(
                aggregate(qkv, scale, SanaMultiscaleAttentionProjection)
                for scale in self.to_qkv_multiscale
            ),
        ]
        outputs = [attend_picture(scale, self.attention_head_dim, self.eps) for scale in scales]
        picture = join_heads(outputs, (height, width)).to(hidden_states.dtype)
        y = self.to_out(picture.movedim(1, -1))
        if self.norm_type == "rms_norm":
            y = normalize(self.norm_out, y).movedim(-1, 1)
        else:
            y = self.norm_out(y.movedim(-1, 1))
        return y + hidden_states if self.residual_connection else y

    @staticmethod
    def why_not(attn: Any) -> str:
        """Why one of the class is none that this computes; `""` if it is one."""
        return why_not_processor(attn, {SanaMultiscaleAttnProcessor2_0}) or why_not_relu(
            attn.nonlinearity
        )

    @staticmethod
    def shape(attn: Any) -> tuple[int, int]:
        """Heads of all scales and their channels."""
        scales = 1 + len(attn.to_qkv_multiscale)
        return scales * attn.to_q.out_features // attn.attention_head_dim, attn.attention_head_dim

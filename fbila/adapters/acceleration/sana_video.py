"""The linear attention of diffusers' SanaVideo, by fbila's kernels.

    q, k = relu(norm(x W_q)), relu(norm(x W_k))             x, y: `(B, N, C)`
    o_i  = R(q_i) (sum_j R(k_j)^T v_j) / (q_i . sum_j k_j + 1e-15)
    y    = W_o o

R turns by the place in time, height and width; the denominator has no R. The stock processor sums
the denominator in the dtype of x: in float16 it is infinite and y 0 for long videos. Here it is
summed in float32.
"""

from typing import Any

from torch import Tensor

from ...ops.derived import derived
from ..host import host
from .sana import FastSanaAttention, mix, project_out, why_not_processor

with host("diffusers"):
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0


class FastSanaVideoAttention(Attention):
    """What `SanaLinearAttnProcessor3_0` computes; other processors are left to run."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Mixes the tokens of `hidden_states` `(B, N, C)`; stock ignores a mask, as this.

        Args:
            cross_attention_kwargs: `rotary_emb`, cos and sin `(1, N, 1, D)`, each number twice.
        """
        rotary = as_rotary(cross_attention_kwargs.get("rotary_emb"), hidden_states)
        if (
            type(self.processor) is not SanaLinearAttnProcessor3_0
            or rotary is None
            or encoder_hidden_states is not None
            or len(cross_attention_kwargs) > 1
        ):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        return project_out(self, mix(self, hidden_states, rotary=rotary), hidden_states)

    @staticmethod
    def why_not(attn: Any) -> str:
        """Why an `Attention` is none that this computes; `""` if it is one."""
        return why_not_processor(attn, {SanaLinearAttnProcessor3_0})

    shape = staticmethod(FastSanaAttention.shape)


def as_rotary(tables: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tables of one turn of all heads and videos; None for anything else."""
    if tables is None:
        return None
    cos, sin = tables
    if cos.dim() != 4 or (cos.shape[0], cos.shape[2]) != (1, 1):
        return None
    if cos.shape[1] != hidden_states.shape[1]:
        return None
    # Layers are given the same ones, of which the kernels' table is made once.
    return derived(
        lambda: (cos[0, :, 0, 0::2].clone(), sin[0, :, 0, 1::2].clone()), "Sana", cos, sin
    )

"""The linear attention of diffusers' Sana, Sana-Sprint and their ControlNets, by fbila's kernels.

    q, k, v = norms(x W_q), norms(x W_k), x W_v             x, y: `(B, N, C)`
    y       = clip(W_o relu_attention(q, k, v))             eps = 1e-15; clipped in float16 alone

With perturbed attention guidance (PAG) the last part of the batch has v in the place of attention.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..host import host
from ..kernel_checks import plain, read_by_maps
from .inference import normalize
from .projections import product, trained_together
from .relu_attention import relu_attention

with host("diffusers"):
    from diffusers.models.attention_processor import (
        Attention,
        PAGCFGSanaLinearAttnProcessor2_0,
        PAGIdentitySanaLinearAttnProcessor2_0,
        SanaLinearAttnProcessor2_0,
    )

# The number of parts of the batch of each processor; the last one is perturbed if there are more
# than one. Processors of other classes run as they are: nothing is known of them.
PARTS: dict[type, int] = {
    SanaLinearAttnProcessor2_0: 1,
    PAGIdentitySanaLinearAttnProcessor2_0: 2,
    PAGCFGSanaLinearAttnProcessor2_0: 3,
}
_EPS = 1e-15


class FastSanaAttention(Attention):
    """What `SanaLinearAttnProcessor2_0` and its PAG variants compute; others are left to run."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Mixes the tokens of `hidden_states` `(B, N, C)`; stock Sana ignores a mask, as this."""
        # Pipelines set processors for the time of a call, PAG's for one.
        parts = PARTS.get(type(self.processor), 0)
        if not parts or cross_attention_kwargs:
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        if parts == 1:
            y = project_out(self, mix(self, hidden_states, encoder_hidden_states), hidden_states)
        else:
            batch = hidden_states.unflatten(0, (parts, -1))
            mixed = mix(self, batch[:-1].flatten(0, 1), norms=False)
            perturbed = self.to_v(batch[-1])
            y = torch.cat([project_out(self, x, hidden_states) for x in (mixed, perturbed)])
        if hidden_states.dtype != torch.float16:
            return y
        # Sana's activations reach beyond float16's range.
        return y.clip(-65504, 65504) if y.requires_grad else y.clip_(-65504, 65504)

    @staticmethod
    def why_not(attn: Any) -> str:
        """Why an `Attention` is none that this computes; `""` if it is one."""
        return why_not_processor(attn, PARTS)

    @staticmethod
    def shape(attn: Any) -> tuple[int, int]:
        """Heads and their channels."""
        return attn.heads, attn.inner_dim // attn.heads


def why_not_processor(attn: Any, known: Collection[type]) -> str:
    """Why a module with this processor stays: what another class computes is not known."""
    kind = type(attn.processor)
    return "" if kind in known else f"runs {kind.__name__}, for which there are no kernels here"


def mix(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    norms: bool = True,
) -> Tensor:
    """The heads `(B, N, H * D)` of a diffusers `Attention` in front of its output projection.

    Args:
        norms: Whether q and k go through theirs; PAG's processors leave them out.
    """
    maps = attn.to_q, attn.to_k, attn.to_v
    if encoder_hidden_states is None and trained_together(maps):
        sizes = [each.out_features for each in maps]
        q, k, v = product(maps, hidden_states).split(sizes, -1)
    else:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
    if norms and attn.norm_q is not None:
        q = normalize(attn.norm_q, q)
    if norms and attn.norm_k is not None:
        k = normalize(attn.norm_k, k)
    q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return relu_attention(q, k, v, _EPS, rotary).transpose(1, 2).flatten(2)


def project_out(attn: Any, tokens: Tensor, like: Tensor) -> Tensor:
    """The output `(B, N, C)` of its heads, which go on in the dtype of `like`, as in stock."""
    first, dropout = attn.to_out
    # Autocast has a plain linear map read them as they are.
    if tokens.dtype != read_by_maps(like) or not plain(first, nn.Linear):
        tokens = tokens.to(like.dtype)
    return dropout(first(tokens))

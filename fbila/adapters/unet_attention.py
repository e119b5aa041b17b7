"""LinFusion's layer as a diffusers `Attention`.

LoRA injection, `attn_processors`, IP-Adapter loading and offloading all look for that class and for
a `.processor`. The mathematics stays in `fbila.layers`.
"""

import logging
from typing import Any

from torch import Tensor

from ..layers import GeneralizedLinearAttention
from ..layers.linfusion import nonlinear_projection
from .diffusers import SOFTMAX_PROCESSORS
from .host import host
from .report import AdapterError

with host("diffusers"):
    from diffusers.models.attention_processor import Attention

logger = logging.getLogger(__name__)

# What diffusers passes to every attention layer although it is meant for other processors.
_QUIET_ARGUMENTS = {"ip_adapter_masks", "ip_hidden_states"}


class LinFusionAttention(GeneralizedLinearAttention, Attention):
    """Self-attention of a UNet, computed by LinFusion's layer.

    A plain `AttnProcessor2_0` is parked in `.processor` and never run. Slicing, xformers and the
    other ways of computing the same softmax may be set and change nothing; a processor that means
    another computation makes the forward pass raise.

    Args:
        dim: Channels.
        heads: Heads.
        projection_mid_dim: Width inside F, see `fbila.layers.linfusion.nonlinear_projection`.
        name: Path in the UNet, for error messages.
    """

    def __init__(
        self, dim: int, heads: int, projection_mid_dim: int | None = None, name: str = ""
    ) -> None:
        if dim % heads:
            raise AdapterError(f"{name}: heads must divide dim, got {dim=} and {heads=}")
        Attention.__init__(self, query_dim=dim, heads=heads, dim_head=dim // heads)
        self.to_q_ = nonlinear_projection(dim, projection_mid_dim)
        self.to_k_ = nonlinear_projection(dim, projection_mid_dim)
        self.name = name

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Mixes the tokens of `hidden_states` `(B, N, C)`.

        Raises:
            AdapterError: If the call asks for what this layer would have to ignore: a foreign
                processor, another sequence for the keys, or a mask.
        """
        # Some pipelines assign .processor directly, so only here can it be seen for certain.
        if type(self.processor) not in SOFTMAX_PROCESSORS:
            raise AdapterError(
                f"{type(self.processor).__name__} was set on {self.name}, which runs linear "
                "attention and would ignore it. Unmount LinFusion, or leave this layer out of what "
                "sets the processor (pag_applied_layers, for one)."
            )
        if encoder_hidden_states is not None:
            raise AdapterError(
                f"{self.name} is self-attention, but encoder_hidden_states "
                f"{list(encoder_hidden_states.shape)} was passed to it."
            )
        if attention_mask is not None:
            raise AdapterError(
                f"{self.name}: attention_mask {list(attention_mask.shape)} was passed, and "
                "LinFusion's layers take none. Run this call inside linfusion.disabled()."
            )
        unknown = cross_attention_kwargs.keys() - _QUIET_ARGUMENTS
        if unknown:
            logger.warning("%s ignores cross_attention_kwargs %s", self.name, sorted(unknown))
        return super().forward(hidden_states)

    def fuse_projections(self, fuse: bool = True) -> None:
        """Nothing to fuse: queries, keys and values are projections of different inputs."""

"""LinFusion's layer as a diffusers `Attention`.

LoRA injection, `attn_processors`, IP-Adapter loading and offloading all look for that class and for
a `.processor`. The mathematics stays in `fbila.layers`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import GeneralizedLinearAttention
from ...layers.linfusion import nonlinear_projection
from ..host import host
from ..processors import is_softmax
from ..report import AdapterError

with host("diffusers"):
    from diffusers.models.attention_processor import Attention

logger = logging.getLogger(__name__)

# The bias by which diffusers hides a key.
_HIDDEN = -10000.0
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
        self.fused = None
        self.name = name

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Mixes the tokens of `hidden_states` `(B, N, C)`.

        `attention_mask` may hide keys: `(B, N)` or `(B, 1, N)`, True or 0 for those that are seen,
        False or at most -10000 for those that are not.

        Raises:
            AdapterError: If the call asks for what this layer would have to ignore: a foreign
                processor, a skipped attention map, another sequence for the keys, or a mask that
                does more than hide keys.
        """
        # Some pipelines assign .processor directly, so only here can it be seen for certain.
        if not is_softmax(self.processor):
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
        # A look into a module's attributes that finds nothing takes long.
        if "_diffusers_hook" in self.__dict__:
            self._require_attention_scores()
        if self.fused is not None:
            self._require_inference(hidden_states)
        unknown = cross_attention_kwargs.keys() - _QUIET_ARGUMENTS
        if unknown:
            logger.warning("%s ignores cross_attention_kwargs %s", self.name, sorted(unknown))
        key_mask = None if attention_mask is None else self._key_mask(attention_mask, hidden_states)
        return super().forward(hidden_states, key_mask)

    def _require_attention_scores(self) -> None:
        registry: Any = self._diffusers_hook
        for hook in registry.hooks.values():
            if getattr(hook, "skip_attention_scores", False):
                raise AdapterError(
                    f"skip_attention_scores was set on {self.name}, which runs linear attention "
                    "and has no attention map to skip. Leave this layer out of it, or remove its "
                    "hook and unmount LinFusion."
                )

    def _require_inference(self, hidden_states: Tensor) -> None:
        modules = self._modules
        if not type(modules["to_q"]) is type(modules["to_k"]) is type(modules["to_v"]) is nn.Linear:
            raise AdapterError(
                f"A LoRA was loaded on {self.name}, whose projections are fused and would ignore "
                "it. Call linfusion.unfuse(), then pipeline.fuse_lora(), then linfusion.fuse()."
            )
        if torch.is_grad_enabled() and (
            hidden_states.requires_grad or self.to_q.weight.requires_grad
        ):
            raise AdapterError(
                f"{self.name} is called with gradients enabled, but its projections are fused and "
                "have none. Use torch.no_grad(), or call linfusion.unfuse() first."
            )

    def _key_mask(self, mask: Tensor, hidden_states: Tensor) -> Tensor:
        B, N, _ = hidden_states.shape
        if mask.shape not in ((B, N), (B, 1, N)):
            raise AdapterError(
                f"{self.name}: attention_mask {list(mask.shape)} is no key mask of {N} tokens; "
                "linear attention can hide keys, not query-key pairs. Run this call inside "
                "linfusion.disabled()."
            )
        mask = mask.reshape(B, N)
        if mask.dtype == torch.bool:
            return mask
        if not torch.compiler.is_compiling() and ((mask > _HIDDEN) & (mask != 0)).any():
            raise AdapterError(
                f"{self.name}: attention_mask holds biases other than 0 and {_HIDDEN}; linear "
                "attention can hide keys, not weigh them so."
            )
        return mask > _HIDDEN

    def fuse_projections(self, fuse: bool = True) -> None:
        """Nothing to fuse: queries, keys and values are projections of different inputs."""

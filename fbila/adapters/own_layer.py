"""Layers with weights of their own in the place of a model's attention, and what they are told."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .report import AdapterError


@dataclass(frozen=True)
class AttentionSpec:
    """What a factory needs to know of the attention that its layer takes the place of.

    Attributes:
        name: Path in the model.
        dim, out_dim: Channels of input and output.
        heads, kv_heads, head_dim: Heads of queries, of keys and values, and their channels.
        qkv_bias, qk_norm, scale_norm, gated, rope: What it has beside the projections.
        num_prefix_tokens: Class and register tokens in front, where its class says so; else 0.
        module: The module itself, to take weights from.
    """

    name: str
    dim: int
    out_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    scale_norm: bool
    gated: bool
    rope: bool
    num_prefix_tokens: int
    module: nn.Module

    def why_not_plain(self) -> str:
        """What a layer that is made of `dim` and heads alone would lose; `""` if nothing."""
        reasons = {
            "its rotary position embedding would be lost": self.rope,
            "its query and key norms would be lost": self.qk_norm,
            "its norm after attention would be lost": self.scale_norm,
            "its gate would be lost": self.gated,
            "its projections are not square": not (
                self.heads == self.kv_heads
                and self.dim == self.out_dim == self.heads * self.head_dim
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")


class OwnLayer(nn.Module):
    """A layer, called as timm's blocks call their attention.

    Attributes:
        layer: `(B, N, C)` to `(B, N, C)`; it is given `rope`, `attn_mask` and `is_causal` where its
            forward takes arguments of these names.
        name: Path in the model, for error messages.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self._takes = frozenset(inspect.signature(layer.forward).parameters)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mixes the tokens of `x`.

        Raises:
            AdapterError: If the call asks for what the layer would have to ignore.
        """
        given = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal or None}
        passed: dict[str, Any] = {}
        for argument, value in given.items():
            if value is None:
                continue
            if argument not in self._takes:
                raise AdapterError(
                    f"{self.name} was called with {argument}, which "
                    f"{type(self.layer).__name__}.forward does not take and would ignore."
                )
            passed[argument] = value
        return self.layer(x, **passed)


def make_layer(
    spec: AttentionSpec, make: type[nn.Module] | Callable[[AttentionSpec], nn.Module]
) -> OwnLayer:
    """The layer for a place, on its device and in its dtype.

    It starts from the weights that are there where their names and shapes are the same.

    Args:
        make: A class, called with the channels, `num_heads` and, if it takes it, `qkv_bias`; or a
            factory.

    Raises:
        AdapterError: If no module comes out, or one without parameters, or one that cannot take
            the rotary embedding.
    """
    layer = _construct(spec, make) if isinstance(make, type) else make(spec)
    if not isinstance(layer, nn.Module):
        raise AdapterError(
            f"attention must make an nn.Module, got {type(layer).__name__} for {spec.name}."
        )
    if next(layer.parameters(), None) is None:
        raise AdapterError(
            f"attention made a {type(layer).__name__} without parameters for {spec.name}, which "
            "could not be told where the model is moved to."
        )
    own = OwnLayer(layer, spec.name)
    if spec.rope and "rope" not in own._takes:
        raise AdapterError(
            f"{spec.name} is given a rotary position embedding, which {type(layer).__name__}."
            "forward does not take and would ignore. Leave it out (exclude=), or take rope=."
        )
    theirs = spec.module.state_dict()
    first = next(iter(theirs.values()))
    layer.to(first.device, first.dtype).train(spec.module.training)
    if {k: v.shape for k, v in layer.state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }:
        layer.load_state_dict(theirs)
    return own


def _construct(spec: AttentionSpec, kind: type[nn.Module]) -> nn.Module:
    takes = inspect.signature(kind).parameters
    bias = {"qkv_bias": spec.qkv_bias} if "qkv_bias" in takes else {}
    return kind(spec.dim, num_heads=spec.heads, **bias)

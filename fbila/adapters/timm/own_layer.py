"""Layers with weights of their own in the place of a model's attention, and what they are told."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...layers.grid import as_grid, as_tokens, grid_of
from ..report import AdapterError


@dataclass(frozen=True)
class AttentionSpec:
    """What a factory needs to know of the attention that its layer takes the place of.

    Attributes:
        name: Path in the model.
        dim, out_dim: Channels of input and output.
        heads, kv_heads, head_dim: Heads of queries, of keys and values, and their channels.
        qkv_bias, qk_norm, scale_norm, gated, rope: What it has beside the projections.
        num_prefix_tokens: Class and register tokens in front, if it or the model says so.
        grid_size: Rows and columns of the model's patches, where it says so; else None.
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
    grid_size: tuple[int, int] | None
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
        layer: `(B, N, C)` to `(B, N, C)`; or pictures `(B, C, H, W)` to pictures, if it has a true
            attribute `takes_pictures`. It is given `rope`, `attn_mask`, `is_causal`, `H` and `W`
            where its forward takes arguments of these names.
        name: Path in the model, for error messages.
        grid_size: H and W, for as many tokens; other numbers of tokens are a square.
    """

    def __init__(
        self, layer: nn.Module, name: str, grid_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        self.grid_size = grid_size
        self._takes = frozenset(inspect.signature(layer.forward).parameters)
        self._takes_pictures = bool(getattr(layer, "takes_pictures", False))

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
            ValueError: If the layer needs a grid, and the tokens make none.
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
        if self._takes_pictures:
            return as_tokens(self.layer(as_grid(x, *self._grid(x)), **passed))
        if {"H", "W"} <= self._takes:
            H, W = self._grid(x)
            passed.update(H=H, W=W)
        return self.layer(x, **passed)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        patches = x.shape[1] - getattr(self.layer, "num_prefix_tokens", 0)
        if self.grid_size is not None and patches == self.grid_size[0] * self.grid_size[1]:
            return self.grid_size
        return grid_of(patches, None, None)


def make_layer(
    spec: AttentionSpec, make: type[nn.Module] | Callable[[AttentionSpec], nn.Module]
) -> OwnLayer:
    """The layer for a place, on its device and in its dtype.

    It starts from the weights that are there where their names and shapes are the same.

    Args:
        make: A class, called with the channels, `num_heads` and, if it takes them, `qkv_bias`,
            `grid_size` and `num_prefix_tokens`; or a factory.

    Raises:
        AdapterError: If no module comes out, or one without parameters, or one that cannot take
            the rotary embedding; or a class needs a grid where there is none.
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
    own = OwnLayer(layer, spec.name, spec.grid_size)
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
    told = {
        name: getattr(spec, name) for name in ("qkv_bias", "num_prefix_tokens") if name in takes
    }
    if "grid_size" in takes:
        if spec.grid_size is None:
            raise AdapterError(
                f"{kind.__name__} needs the grid of tokens, which the model does not tell "
                f"({spec.name}): give a factory that does, as attention=."
            )
        told["grid_size"] = spec.grid_size
    on_grid = (
        getattr(kind, "takes_pictures", False) or "H" in inspect.signature(kind.forward).parameters
    )
    if on_grid and spec.num_prefix_tokens and "num_prefix_tokens" not in takes:
        raise AdapterError(
            f"{kind.__name__} takes tokens as a grid, which {spec.num_prefix_tokens} class or "
            f"register tokens in front are no part of ({spec.name}). timm.create_model(..., "
            'class_token=False, global_pool="avg") makes a model without them.'
        )
    return kind(spec.dim, num_heads=spec.heads, **told)

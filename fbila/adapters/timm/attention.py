"""timm's attention classes with linear attention in the place of softmax, and nothing else changed.

    q, k, v = norms(split(W_qkv x))
    o_i     = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) . sum_j phi(k_j))
    y       = W_proj (gate(x) * norm(o))                    x, y: `(B, N, C)`

Parameters and their names are timm's, so that its weights load with `strict=True`. There is no
scale: that of softmax sets how sharp it is, which here the feature map does.
"""

import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import host
from ..report import AdapterError
from .masks import as_key_mask, refuse_causal
from .rope import as_rotary, attend

with host("timm"):
    import timm
    from timm.layers import Attention, AttentionRope, register_notrace_module
    from timm.models.eva import EvaAttention

    # Told like a timm that is broken, since the same command mends it.
    if "num_kv_heads" not in inspect.signature(AttentionRope).parameters:
        raise ImportError(f"timm {timm.__version__} is older than 1.0.31")

logger = logging.getLogger(__name__)


class _Linear:
    """What the three have in common.

    Attributes:
        feature_map: Name of phi, as in `fbila.linear_attn`; a subclass may set another.
        min_tokens: Shorter sequences go through timm's own softmax.
        name: Path in the model, for error messages.
    """

    feature_map: str = "elu1"
    min_tokens: int = 0
    name: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warn_of_dropout(self)

    def _mix(
        self: Any, x: Tensor, rope: Tensor | None, mask: Tensor | None, causal: bool
    ) -> Tensor:
        refuse_causal(causal)
        if self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks:
            raise AdapterError(
                f"{self.name or type(self).__name__}.attn_drop carries a hook, as "
                "timm.utils.AttentionExtract puts there. Linear attention has no softmax map; use "
                "handle.disabled() to extract maps."
            )
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        rotary = None
        if rope is not None:
            rotary = as_rotary(rope, self.num_prefix_tokens, self.rotate_half)
        out = attend(q, k, v, self.feature_map, rotary, *as_key_mask(mask, x))
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


@register_notrace_module
class LinearAttention(_Linear, Attention):
    """Linear attention as a timm `attn_layer`, without parameters of its own.

    The constructor is that of `timm.layers.Attention`; attention dropout has no meaning and is
    mentioned in the log. Weights trained for softmax load, but the function is another one: they
    are a place to start training from.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("test_vit", attn_layer=LinearAttention)
        >>> model(torch.randn(1, 3, 160, 160)).shape
        torch.Size([1, 1000])

        Another feature map is another class:

        >>> class ReLUAttention(LinearAttention):
        ...     feature_map = "relu"
        >>> model = timm.create_model("test_vit", attn_layer=ReLUAttention)

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, eq. 4-6, without causality.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mixes the tokens of `x` `(B, N, C)`.

        Args:
            attn_mask: bool or added to logits; must broadcast from `(B, 1, 1, N)`.
            is_causal: Must be False.

        Raises:
            AdapterError: If the mask does more than hide or weigh keys, or is causal; or if
                somebody waits for the softmax map.
        """
        if x.shape[1] < self.min_tokens:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self._mix(x, None, attn_mask, is_causal)

    def _project(self, x: Tensor) -> list[Tensor]:
        return _split(self.qkv(x), self.num_heads)


class TakesRope(_Linear):
    """The forward pass of the two that are given a rotary position embedding."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mixes the tokens of `x` `(B, N, C)`, those after the prefix at the positions of `rope`.

        Args:
            rope: `(N - prefix, 2 K)`, or with heads, or with pictures and heads, in front.
            attn_mask, is_causal: As in `LinearAttention`.

        Raises:
            AdapterError: As in `LinearAttention`.
        """
        if x.shape[1] < self.min_tokens:
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]
        return self._mix(x, rope, attn_mask, is_causal)


@register_notrace_module
class LinearAttentionRope(TakesRope, AttentionRope):
    """timm's `AttentionRope` without softmax; the rotation is in the numerator alone."""

    def _project(self, x: Tensor) -> list[Tensor]:
        if self.qkv is not None:
            return _split(self.qkv(x), self.num_heads)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [_heads(project(x), H) for project, H in zip(projections, heads, strict=True)]


@register_notrace_module
class LinearEvaAttention(TakesRope, EvaAttention):
    """timm's `EvaAttention` without softmax; the rotation is in the numerator alone."""

    def _project(self: Any, x: Tensor) -> list[Tensor]:
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [_heads(project(x), self.num_heads) for project in projections]
        if self.q_bias is None:
            return _split(self.qkv(x), self.num_heads)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return _split(self.qkv(x) + bias, self.num_heads)
        return _split(F.linear(x, self.qkv.weight, bias), self.num_heads)


# Class of timm -> what takes its place.
LINEAR: dict[type[nn.Module], type[nn.Module]] = {
    Attention: LinearAttention,
    AttentionRope: LinearAttentionRope,
    EvaAttention: LinearEvaAttention,
}


def warn_of_dropout(module: Any) -> None:
    """Says that there is no map whose entries could be dropped."""
    if module.attn_drop.p:
        logger.warning(
            "attn_drop=%g has no effect: linear attention has no attention map to drop entries of; "
            "use proj_drop.",
            module.attn_drop.p,
        )


def _split(qkv: Tensor, heads: int) -> list[Tensor]:
    """(B, N, 3 * C) -> three (B, H, N, D) views of one tensor."""
    return [part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2)]


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

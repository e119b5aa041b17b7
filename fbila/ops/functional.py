"""The public operators: signature, mathematics, shapes; then check and dispatch."""

import torch

from . import autograd as _autograd  # noqa: F401  (registers the gradient)
from .checks import (
    check_feature_map,
    check_normalizer,
    check_scale,
    check_tensors,
    check_unavailable,
    choose_implementation,
)
from .reference import linear_attn_reference, simple_la_reference


def linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str | None = None,
    eps: float = 1e-6,
    normalizer: str = "mean",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Normalised bidirectional linear attention, in time and memory linear in the tokens.

        o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j))

    with eps in the denominator as `normalizer` says. The order of the arguments and their shapes
    are those of `torch.nn.functional.scaled_dot_product_attention`. Any strides are read in place:
    pass a `(B, N, H, K)` tensor, or a slice of a packed qkv, as its transposed view. Under
    `torch.autocast` the inputs are cast to the autocast dtype, as that function does.

    Args:
        q: `(B, H, N, K)` queries; K from 1 to 256; float16, bfloat16, float32 or float64.
        k: `(B, H, M, K)` keys. M may differ from N.
        v: `(B, H, M, V)` values; V from 0 to 256, may differ from K.
        feature_map: phi, fused into the kernels: None (q and k as they are), "elu1"
            (`elu(x) + 1`) or "relu".
        eps: Added to the denominator; finite, not negative.
        normalizer: "mean": `phi(q) . mean_j phi(k_j) + eps` (with the numerator's sum also over
            M; LinFusion, MLLA, RALA). "sum": `phi(q) . sum_j phi(k_j) + eps` (SANA, EfficientViT).
            Published weights use both; with the same eps they differ.
        rotary: Not implemented yet.
        key_weight: Not implemented yet.
        key_mask: Not implemented yet.
        cu_seqlens: Not implemented yet.
        impl: "triton", "reference" (eager PyTorch), or None: triton on CUDA, else reference.

    Returns:
        `(B, H, N, V)` in the dtype of q. Its memory is token-major where q's is, so that
        `o.transpose(1, 2).flatten(2)` is a view. With M = 0 it is 0. A row whose denominator is 0
        gives 0 where eps > 0.

    Raises:
        ValueError: Shapes, devices, `normalizer`, `eps`, `feature_map` or `impl` that do not fit.
        TypeError: Dtypes that differ or are not supported.
        NotImplementedError: An option that is not implemented yet; grouped heads.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, eq. 4-6, without causality.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> linear_attn(q, k, v, feature_map="elu1").shape
        torch.Size([1, 2, 64, 16])
    """
    check_unavailable(
        rotary=rotary, key_weight=key_weight, key_mask=key_mask, cu_seqlens=cu_seqlens
    )
    check_feature_map(feature_map)
    check_normalizer(normalizer, eps)
    q, k, v = _autocast(q, k, v)
    check_tensors(q, k, v)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return linear_attn_reference(q, k, v, feature_map, normalizer, eps)
    return torch.ops.fbila.linear_attn(q, k, v, feature_map or "none", normalizer, 1.0, eps)


def simple_la(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str | None = None,
    scale: float | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Bidirectional linear attention without a denominator.

        o_i = scale * phi(q_i) sum_j phi(k_j)^T v_j

    Args:
        q: `(B, H, N, K)` queries; K from 1 to 256; float16, bfloat16, float32 or float64.
        k: `(B, H, M, K)` keys. M may differ from N.
        v: `(B, H, M, V)` values; V from 0 to 256, may differ from K.
        feature_map: phi, fused into the kernels: None, "elu1" or "relu".
        scale: None: `K ** -0.5`. It is the only place where the result is scaled: nothing is
            divided by M.
        rotary: Not implemented yet.
        key_weight: Not implemented yet.
        key_mask: Not implemented yet.
        cu_seqlens: Not implemented yet.
        impl: "triton", "reference" (eager PyTorch), or None: triton on CUDA, else reference.

    Returns:
        `(B, H, N, V)` in the dtype of q; token-major in memory where q is. With M = 0 it is 0.

    Raises:
        ValueError, TypeError, NotImplementedError: As for `linear_attn`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> simple_la(q, k, v, scale=1 / 64).shape
        torch.Size([1, 2, 64, 16])
    """
    check_unavailable(
        rotary=rotary, key_weight=key_weight, key_mask=key_mask, cu_seqlens=cu_seqlens
    )
    check_feature_map(feature_map)
    q, k, v = _autocast(q, k, v)
    check_tensors(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scale(scale)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return simple_la_reference(q, k, v, feature_map, scale)
    return torch.ops.fbila.linear_attn(q, k, v, feature_map or "none", "none", scale, 0.0)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the autocast dtype inside `torch.autocast`; float64 is left alone there."""
    first = tensors[0]
    # Autocast does not know the meta device.
    if not isinstance(first, torch.Tensor) or first.device.type == "meta":
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )

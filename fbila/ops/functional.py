"""The public operators: signature, mathematics, shapes; then check and dispatch."""

import torch

from . import autograd, focused_library
from .autocast import cast_for_autocast
from .checks import (
    check_feature_dim,
    check_feature_map,
    check_focusing_factor,
    check_normalizer,
    check_scale,
    choose_implementation,
)
from .feature_maps import feature_dim
from .focusing import focused_la_reference
from .kernel_inputs import kernel_columns, kernel_keys, kernel_shift, kernel_table
from .option_checks import (
    as_rotary,
    check_cu_seqlens,
    check_focus,
    check_key_options,
    check_key_positions,
    check_shared_rotary,
)
from .reference import linear_attn_reference, simple_la_reference
from .repeated import Known, recall, remember, signature
from .rotary import Rotary
from .tensor_checks import check_tensors


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

        o_i = q~_i sum_j w_j k~_j^T v_j / (phi(q_i) . sum_j w_j phi(k_j))

    with eps in the denominator as `normalizer` says. q~ and k~ are phi(q) and phi(k), rotated where
    `rotary` is given; w is 1 without `key_weight`. The order of the arguments and their shapes
    are those of `torch.nn.functional.scaled_dot_product_attention`. Any strides are read in place:
    pass a `(B, N, H, K)` tensor, or a slice of a packed qkv, as its transposed view. Under
    `torch.autocast` the inputs are cast to the autocast dtype, as that function does.

    Args:
        q: `(B, H, N, K)` queries; K from 1 to 256; float16, bfloat16, float32 or float64.
        k: `(B, Hk, M, K)` keys. M may differ from N. Hk is H or divides it: query head h then
            uses key head `h // (H // Hk)`.
        v: `(B, Hk, M, V)` values; V from 0 to 256, may differ from K.
        feature_map: phi: None (q and k as they are), "elu1" (`elu(x) + 1`), "relu",
            "relu_offset" (`relu(x) + 1e-6`), "exp", or "signed" (`[relu(x), relu(-x)]`, 2 K
            features for K up to 128, where the others make K; of `sign(x) |x|^p` they are
            PolaFormer's).
        eps: Added to the denominator; finite, not negative.
        normalizer: "mean": `phi(q) . mean_j phi(k_j) + eps` (with the numerator's sum also over
            M; LinFusion, MLLA, RALA). "sum": `phi(q) . sum_j phi(k_j) + eps` (SANA, EfficientViT).
            Published weights use both; with the same eps they differ.
        rotary: `(cos, sin)`, or a `Rotary` for another pairing: tables `(N, K / 2)`, or
            `(H, N, K / 2)`, that rotate phi(q) and phi(k) in the numerator alone (MLLA, RALA,
            PolaFormer++, SANA-Video). K must be even and M be N. With "signed" they have K
            columns. They get no gradient.
        key_weight: `(B, M)` or `(B, Hk, M)`, w_j before phi(k_j) in both sums (RALA, VSSD). "mean"
            still divides by the number of keys. It gets a gradient.
        key_mask: bool `(B, M)`, True where a key is there. Any other is as if it were absent, in
            the sums and in the number of keys, even if it is NaN there; its gradients are 0.
        cu_seqlens: int32 or int64 `(sequences + 1,)`, on the device of q: sequence s is the rows
            from `cu_seqlens[s]` to `cu_seqlens[s + 1]`, 0 first and T last. Then q is `(T, H, K)`,
            k `(T, Hk, K)`, v `(T, Hk, V)`, and each sequence attends to itself alone. key_weight is
            `(T,)` or `(Hk, T)`, key_mask `(T,)`, and the tables have T rows.
        impl: "triton", "reference" (eager PyTorch), or None: triton on CUDA, else reference.

    Returns:
        `(B, H, N, V)` in the dtype of q; `(T, H, V)` with cu_seqlens. Its memory is token-major
        where q's is, so that `o.transpose(1, 2).flatten(2)` is a view, and channels-first, `(B, H,
        V, N)`, where q's is. Without any key it is 0. A row whose denominator is 0 gives 0 where
        eps > 0.

    Raises:
        ValueError: Shapes, devices, `normalizer`, `eps`, `feature_map` or `impl` that do not fit;
            tables of rotary that require a gradient.
        TypeError: Dtypes that differ or are not supported; arguments of another type.
        NotImplementedError: float64 on a GPU with a Triton older than 3.5; a second derivative.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, eq. 4-6, without causality.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> linear_attn(q, k, v, feature_map="elu1").shape
        torch.Size([1, 2, 64, 16])
    """
    call = None
    if rotary is None and key_weight is None and key_mask is None and cu_seqlens is None:
        call = signature(q, k, v, feature_map, normalizer, eps, impl)
        known = recall(call)
        if known is not None:
            return known(q, k, v)
    check_feature_map(feature_map)
    check_normalizer(normalizer, eps)
    q, k, v = cast_for_autocast(q, k, v)
    packed = cu_seqlens is not None
    check_tensors(q, k, v, packed=packed)
    check_feature_dim(q.shape[-1], feature_map)
    check_cu_seqlens(cu_seqlens, q)
    tables = as_rotary(rotary)
    check_shared_rotary(tables, q, k, feature_map, packed=packed)
    check_key_options(k, key_weight, key_mask, packed=packed)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return linear_attn_reference(
            q, k, v, feature_map, normalizer, eps, tables, key_weight, key_mask, cu_seqlens
        )
    remember(call, Known(feature_map or "none", normalizer, 1.0, eps))
    return _launch(
        q, k, v, tables, key_weight, key_mask, cu_seqlens, feature_map, normalizer, 1.0, eps
    )


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

        o_i = scale * q~_i sum_j w_j k~_j^T v_j

    q~ and k~ are phi(q) and phi(k), rotated where `rotary` is given; w is 1 without `key_weight`.

    Args:
        q: `(B, H, N, K)` queries; K from 1 to 256; float16, bfloat16, float32 or float64.
        k: `(B, Hk, M, K)` keys; M may differ from N, and Hk may divide H.
        v: `(B, Hk, M, V)` values; V from 0 to 256, may differ from K.
        feature_map: phi: None, "elu1", "relu", "relu_offset", "exp" or "signed".
        scale: None: `F ** -0.5` for F features, 2 K with "signed" and otherwise K. It is the only
            place where the result is scaled: nothing is divided by M.
        rotary, key_weight, key_mask, cu_seqlens: As in `linear_attn`; a mask changes the sum
            alone, since there is no number of keys in it.
        impl: "triton", "reference" (eager PyTorch), or None: triton on CUDA, else reference.

    Returns:
        `(B, H, N, V)` in the dtype of q, `(T, H, V)` with cu_seqlens; token-major in memory where q
        is. Without any key it is 0.

    Raises:
        ValueError, TypeError, NotImplementedError: As for `linear_attn`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> simple_la(q, k, v, scale=1 / 64).shape
        torch.Size([1, 2, 64, 16])
    """
    call = None
    if rotary is None and key_weight is None and key_mask is None and cu_seqlens is None:
        call = signature(q, k, v, feature_map, "none", scale, impl)
        known = recall(call)
        if known is not None:
            return known(q, k, v)
    check_feature_map(feature_map)
    q, k, v = cast_for_autocast(q, k, v)
    packed = cu_seqlens is not None
    check_tensors(q, k, v, packed=packed)
    check_feature_dim(q.shape[-1], feature_map)
    check_cu_seqlens(cu_seqlens, q)
    tables = as_rotary(rotary)
    check_shared_rotary(tables, q, k, feature_map, packed=packed)
    check_key_options(k, key_weight, key_mask, packed=packed)
    if scale is None:
        scale = feature_dim(q.shape[-1], feature_map) ** -0.5
    check_scale(scale)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return simple_la_reference(
            q, k, v, feature_map, scale, tables, key_weight, key_mask, cu_seqlens
        )
    remember(call, Known(feature_map or "none", "none", scale, 0.0))
    return _launch(
        q, k, v, tables, key_weight, key_mask, cu_seqlens, feature_map, "none", scale, 0.0
    )


def focused_la(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    focusing_factor: float = 3,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    key_mask: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    r"""Focused linear attention: features turned towards their largest channels.

        x^ = (relu(x) + 1e-6) / softplus(scale)          f(x) = ||x^|| x^p / ||x^p||
        o_i = f(q_i) mean_j f(k_j)^T v_j / (f(q_i) . mean_j f(k_j) + eps)

    Both norms are over all heads and channels of a token, so that the heads are not independent.

    Args:
        q: `(B, H, N, K)` queries; K from 1 to 256; float16, bfloat16, float32 or float64.
        k: `(B, H, M, K)` keys, with the heads of q. M may differ from N.
        v: `(B, H, M, V)` values; V from 0 to 256, may differ from K.
        focusing_factor: p, positive and at most 32.
        scale: `(H, K)`, the parameter as it is learned, before softplus; shared by q and k. None:
            nothing is divided. It gets a gradient.
        eps: Added to the denominator; finite, not negative.
        key_mask: As in `linear_attn`.
        key_positions: `(H, M, K)`, added to the keys of every item before f, in the dtype of k. It
            gets a gradient. Read in place where it is a transposed `(M, H, K)`.
        impl: As in `linear_attn`.

    Returns:
        `(B, H, N, V)` in the dtype of q; token-major in memory where q is.

    Raises:
        ValueError, TypeError: As for `linear_attn`; grouped heads; `focusing_factor`, `scale` or
            `key_positions` that do not fit.

    Source: Han et al., "FLatten Transformer", ICCV 2023, eq. 8 and 9; scale, eps and the norms over
    all heads as in its code.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> focused_la(q, k, v, scale=torch.zeros(2, 16)).shape
        torch.Size([1, 2, 64, 16])
    """
    check_focusing_factor(focusing_factor)
    check_normalizer("mean", eps)
    q, k, v = cast_for_autocast(q, k, v)
    check_tensors(q, k, v)
    check_focus(q, k, scale)
    check_key_options(k, None, key_mask)
    check_key_positions(key_positions, k)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return focused_la_reference(q, k, v, focusing_factor, scale, eps, key_mask, key_positions)
    keys = kernel_keys(k, None, key_mask, count=True)
    return focused_library.focused_la(
        q, k, v, kernel_columns(scale, q), keys.mask, keys.total, kernel_shift(key_positions, k),
        float(focusing_factor), eps,
    )  # fmt: skip


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary | None,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    feature_map: str | None,
    normalizer: str,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """The kernels on checked arguments; packed tensors as a batch of one."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        key_weight = None if key_weight is None else key_weight[None]
        key_mask = None if key_mask is None else key_mask[None]
    keys = kernel_keys(k, key_weight, key_mask, cu_seqlens, count=normalizer != "none")
    table, order = kernel_table(rotary, q)
    o = autograd.linear_attn(
        q, k, v, *keys, table, cu_seqlens, feature_map or "none", normalizer, order, scale, eps
    )
    # Not o[0], whose gradient would be a copy among zeros.
    return o if cu_seqlens is None else o.squeeze(0).transpose(0, 1)

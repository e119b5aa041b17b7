"""The two halves of `linear_attn`: the state of the keys, and what queries make of it."""

import torch

from . import halves_library
from .autocast import cast_for_autocast
from .checks import (
    check_feature_dim,
    check_feature_map,
    check_normalizer,
    choose_implementation,
)
from .feature_maps import feature_dim
from .kernel_inputs import kernel_keys, kernel_table
from .option_checks import as_rotary, check_key_options, check_rotary, check_state
from .reference import apply_reference, state_reference
from .state import State
from .tensor_checks import check_keys, check_query


def linear_attn_state(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_weight: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    impl: str | None = None,
) -> State:
    r"""All that queries need of keys and values: a few sums, however many keys there are.

        kv = sum_j w_j k~_j^T v_j        key_sum = sum_j w_j phi(k_j)        count = sum_j 1

    with k~ = rotate(phi(k)). `linear_attn` is `linear_attn_apply` of this state. States of disjoint
    sets of keys are joined by `+`, and one that does not change can be kept: that of a prompt, for
    every step of a sampler.

    Args:
        k: `(B, H, M, K)` keys.
        v: `(B, H, M, V)` values.
        feature_map: phi, as in `linear_attn`; `linear_attn_apply` must be given the same.
        rotary: As in `linear_attn`, with M rows: `(M, K / 2)` or `(H, M, K / 2)`.
        key_weight: As in `linear_attn`: `(B, M)` or `(B, H, M)`.
        key_mask: As in `linear_attn`: bool `(B, M)`.
        impl: As in `linear_attn`.

    Returns:
        A `State` of kv `(B, H, K, V)`, key_sum `(B, H, K)` and count `(B,)`, in float32 (float64
        for float64 inputs), with "signed" of 2 K rows; kv and key_sum are differentiable.

    Raises:
        ValueError, TypeError, NotImplementedError: As for `linear_attn`.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, eq. 6, without causality.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 16).unbind(0)
        >>> left, right = (
        ...     linear_attn_state(k[:, :, half], v[:, :, half], feature_map="elu1")
        ...     for half in (slice(0, 32), slice(32, 64))
        ... )
        >>> linear_attn_apply(q, left + right, feature_map="elu1").shape
        torch.Size([1, 2, 64, 16])
    """
    check_feature_map(feature_map)
    k, v = cast_for_autocast(k, v)
    check_keys(k, v)
    check_feature_dim(k.shape[-1], feature_map)
    tables = as_rotary(rotary)
    check_rotary(tables, "k", k, k.shape[1], feature_map)
    check_key_options(k, key_weight, key_mask)
    if choose_implementation(impl, k.device, k.dtype) == "reference":
        return state_reference(k, v, feature_map, tables, key_weight, key_mask)
    keys = kernel_keys(k, key_weight, key_mask, count=True)
    table, order = kernel_table(tables, k)
    state = halves_library.linear_attn_state(
        k, v, keys.weight, keys.mask, table, feature_map or "none", order
    )
    B, H, M = k.shape[:3]
    K, V = feature_dim(k.shape[3], feature_map), v.shape[3]
    rows = state.view(B, H, -1)
    count = rows.new_full((B,), M) if keys.total is None else keys.total
    # Contiguous, so that they can be all-reduced.
    kv, key_sum = (x.contiguous() for x in rows.split((K * V, K), -1))
    return State(kv.unflatten(-1, (K, V)), key_sum, count)


def linear_attn_apply(
    q: torch.Tensor,
    state: State,
    *,
    feature_map: str | None = None,
    eps: float = 1e-6,
    normalizer: str = "mean",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    r"""What queries read from a state.

        o_i = q~_i kv / count / (phi(q_i) . key_sum / count + eps)

    with q~ = rotate(phi(q)), for normalizer "mean"; for "sum" without the count. It is 0 where the
    count is 0.

    Args:
        q: `(B, H, N, K)` queries.
        state: Of `linear_attn_state`, for `(B, Hk, M, K)` keys; Hk is H or divides it.
        feature_map: phi, as in `linear_attn`; the one that the state was made with.
        eps: As in `linear_attn`.
        normalizer: As in `linear_attn`.
        rotary: As in `linear_attn`: `(N, K / 2)` or `(H, N, K / 2)`, the tables of the queries'
            own positions.
        impl: As in `linear_attn`.

    Returns:
        `(B, H, N, V)` in the dtype of q; token-major in memory where q is. Gradients go to q and
        to kv and key_sum of the state.

    Raises:
        ValueError, TypeError, NotImplementedError: As for `linear_attn`; also where q and the state
            do not fit.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, eq. 5, without causality.

    Example:
        >>> k, v = torch.randn(2, 1, 2, 77, 16).unbind(0)
        >>> prompt = linear_attn_state(k, v, feature_map="elu1")
        >>> q = torch.randn(1, 2, 64, 16)
        >>> linear_attn_apply(q, prompt, feature_map="elu1").shape
        torch.Size([1, 2, 64, 16])
    """
    check_feature_map(feature_map)
    check_normalizer(normalizer, eps)
    (q,) = cast_for_autocast(q)
    check_query(q)
    check_feature_dim(q.shape[-1], feature_map)
    check_state(state, q, feature_map)
    tables = as_rotary(rotary)
    check_rotary(tables, "q", q, state.kv.shape[1], feature_map)
    if choose_implementation(impl, q.device, q.dtype) == "reference":
        return apply_reference(q, state, feature_map, normalizer, eps, tables)
    rows = torch.cat((state.kv.flatten(-2), state.key_sum), -1).flatten(0, 1)
    table, order = kernel_table(tables, q)
    return halves_library.linear_attn_apply(
        q, rows, state.count.contiguous(), table, feature_map or "none", normalizer, order, eps
    )

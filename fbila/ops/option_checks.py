"""The checks of the options that are tensors, and the words of their errors.

Packed tensors have no batch axis: then `packed` is True and the batch size is left out.
"""

import torch

from .feature_maps import feature_dim
from .rotary import Rotary
from .state import State
from .tensor_checks import check_dense, check_device, check_dtype, check_groups


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, q: torch.Tensor) -> None:
    """`(sequences + 1,)`; what it holds stays on the device, unseen."""
    if cu_seqlens is None:
        return
    check_dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be int32 or int64, got cu_seqlens.dtype={cu_seqlens.dtype}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            "cu_seqlens must have shape (sequences + 1,): 0, then the end of each sequence; got "
            f"cu_seqlens.shape={tuple(cu_seqlens.shape)}."
        )
    check_device("cu_seqlens", cu_seqlens, "q", q)


def check_key_options(
    k: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    packed: bool = False,
) -> None:
    """key_weight `(B, M)` or `(B, H, M)` and key_mask `(B, M)` for k `(B, H, M, K)`."""
    M, H = k.shape[0 if packed else 2], k.shape[1]
    B = () if packed else (k.shape[0],)
    batch = "" if packed else "batch, "
    if key_weight is not None:
        check_dense("key_weight", key_weight)
        check_dtype("key_weight", key_weight)
        check_device("key_weight", key_weight, "k", k)
        if tuple(key_weight.shape) not in ((*B, M), (*B, H, M)):
            raise ValueError(
                f"key_weight must have shape ({batch}keys)={(*B, M)} or ({batch}heads of k, keys)="
                f"{(*B, H, M)}, got key_weight.shape={tuple(key_weight.shape)}."
            )
    if key_mask is not None:
        check_dense("key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(
                "key_mask must be bool, True where a key is there, got "
                f"key_mask.dtype={key_mask.dtype}. Weights go into key_weight."
            )
        check_device("key_mask", key_mask, "k", k)
        if tuple(key_mask.shape) != (*B, M):
            raise ValueError(
                f"key_mask must have shape ({batch}keys)={(*B, M)}, got "
                f"key_mask.shape={tuple(key_mask.shape)}."
            )


def as_rotary(rotary: tuple[torch.Tensor, torch.Tensor] | None) -> Rotary | None:
    """A plain `(cos, sin)` is interleaved."""
    if rotary is None or isinstance(rotary, Rotary):
        return rotary
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        many = f" of {len(rotary)}" if isinstance(rotary, (tuple, list)) else ""
        raise TypeError(
            "rotary must be (cos, sin) or fbila.Rotary(cos, sin, interleaved), got "
            f"{type(rotary).__name__}{many}."
        )
    return Rotary(*rotary)


def check_rotary(
    rotary: Rotary | None,
    name: str,
    x: torch.Tensor,
    key_heads: int,
    feature_map: str | None,
    *,
    packed: bool = False,
) -> None:
    """Tables `(N, F / 2)` or `(H, N, F / 2)` for the F features of x `(B, H, N, K)`, called `name`:
    q or k."""
    if rotary is None:
        return
    axis = 0 if packed else 2
    H, N, K = x.shape[1], x.shape[axis], x.shape[-1]
    for table_name, table in (("cos", rotary.cos), ("sin", rotary.sin)):
        check_dense(table_name, table)
        check_dtype(table_name, table)
        check_device(table_name, table, name, x)
        if table.requires_grad:
            raise ValueError(
                f"The tables of rotary get no gradient, and {table_name}.requires_grad is True. "
                f"Pass {table_name}.detach(), or rotate q and k before the call."
            )
    if not isinstance(rotary.interleaved, bool):
        kind = type(rotary.interleaved).__name__
        raise TypeError(f"Rotary's interleaved must be True or False, got {kind}.")
    if K % 2:
        raise ValueError(f"rotary needs an even head_dim, got {name}.shape[-1]={K}.")
    shape, pairs = tuple(rotary.cos.shape), feature_dim(K, feature_map) // 2
    if shape != tuple(rotary.sin.shape) or shape not in ((N, pairs), (H, N, pairs)):
        raise ValueError(
            f"rotary's cos and sin must have shape (tokens, head_dim / 2)={(N, pairs)} or (heads, "
            f"tokens, head_dim / 2)={(H, N, pairs)}, got cos.shape={shape} and "
            f"sin.shape={tuple(rotary.sin.shape)}."
        )
    if len(shape) == 3 and key_heads != H:
        raise ValueError(
            "With grouped heads the tables of rotary must be shared by the heads, got "
            f"cos.shape={shape} with {H} heads of q and {key_heads} of k."
        )


def check_shared_rotary(
    rotary: Rotary | None,
    q: torch.Tensor,
    k: torch.Tensor,
    feature_map: str | None,
    *,
    packed: bool = False,
) -> None:
    """One pair of tables for q and for k."""
    if rotary is not None and not packed and q.shape[2] != k.shape[2]:
        raise ValueError(
            "The tables of rotary serve q and k, which must have the same length then, got "
            f"q.shape[-2]={q.shape[2]} and k.shape[-2]={k.shape[2]}. Use linear_attn_state and "
            "linear_attn_apply, which take tables each."
        )
    check_rotary(rotary, "q", q, k.shape[1], feature_map, packed=packed)


def check_focus(q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor | None) -> None:
    """scale `(H, K)`; f normalises over all heads, so that q and k must have the same."""
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            "focused_la has no grouped heads, since it normalises over all of them, got "
            f"q.shape[1]={q.shape[1]} and k.shape[1]={k.shape[1]}."
        )
    if scale is None:
        return
    check_dense("scale", scale)
    check_dtype("scale", scale)
    check_device("scale", scale, "q", q)
    H, K = q.shape[1], q.shape[3]
    if tuple(scale.shape) != (H, K):
        raise ValueError(
            f"scale must have shape (heads, head_dim)={(H, K)}, got scale.shape="
            f"{tuple(scale.shape)}. Pass a (1, 1, channels) parameter as scale.view(heads, -1)."
        )


def check_key_positions(key_positions: torch.Tensor | None, k: torch.Tensor) -> None:
    """`(H, M, K)` for k `(B, H, M, K)`."""
    if key_positions is None:
        return
    check_dense("key_positions", key_positions)
    check_dtype("key_positions", key_positions)
    check_device("key_positions", key_positions, "k", k)
    shape = tuple(k.shape[1:])
    if tuple(key_positions.shape) != shape:
        raise ValueError(
            f"key_positions must have shape (heads, keys, head_dim)={shape}, got "
            f"key_positions.shape={tuple(key_positions.shape)}. Pass a (1, keys, channels) "
            "parameter as key_positions[0].unflatten(-1, (heads, -1)).transpose(0, 1)."
        )


def check_state(state: State, q: torch.Tensor, feature_map: str | None) -> None:
    """kv `(B, H, K, V)`, key_sum `(B, H, K)` and count `(B,)`; K is the number of q's features."""
    if not isinstance(state, State):
        raise TypeError(f"state must be a fbila.State, got {type(state).__name__}.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    for field, x in zip(state._fields, state, strict=True):
        name = f"state.{field}"
        check_dense(name, x)
        if x.dtype != dtype:
            raise TypeError(
                f"{name} must be {dtype} for q of {q.dtype}, got {name}.dtype={x.dtype}."
            )
        check_device(name, x, "q", q)
    if state.kv.dim() != 4:
        raise ValueError(
            "state.kv must have 4 dimensions (batch, heads, head_dim of k, head_dim of v), got "
            f"state.kv.shape={tuple(state.kv.shape)}."
        )
    B, H, K, V = state.kv.shape
    if (q.shape[0], feature_dim(q.shape[3], feature_map)) != (B, K):
        raise ValueError(
            "q and state must have the same batch size and head_dim, got "
            f"q.shape={tuple(q.shape)} and state.kv.shape={(B, H, K, V)}."
        )
    check_groups(q.shape[1], H, "state.kv.shape[1]")
    if tuple(state.key_sum.shape) != (B, H, K) or tuple(state.count.shape) != (B,):
        raise ValueError(
            f"state.key_sum and state.count must have shapes {(B, H, K)} and {(B,)}, got "
            f"state.key_sum.shape={tuple(state.key_sum.shape)} and state.count.shape="
            f"{tuple(state.count.shape)}."
        )

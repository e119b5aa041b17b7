"""Packed sequences in the reference: each by itself, as a batch of one."""

from collections.abc import Callable
from itertools import pairwise

import torch

from .layout import in_order_of
from .rotary import Rotary


def attend_packed(
    attend: Callable[..., torch.Tensor],
    cu_seqlens: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary | None,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """o `(T, H, V)` of q, k and v `(T, H, ...)`; `attend` takes and returns `(B, H, N, ...)`."""
    sequences = []
    for tokens in _sequences(cu_seqlens, q.shape[0]):
        o = attend(
            *(x[tokens].transpose(0, 1)[None] for x in (q, k, v)),
            None if rotary is None else _rows(rotary, tokens),
            None if key_weight is None else key_weight[None, ..., tokens],
            None if key_mask is None else key_mask[None, tokens],
        )
        sequences.append(o)
    o = torch.cat(sequences, dim=2)
    return in_order_of(q.transpose(0, 1)[None], o)[0].transpose(0, 1)


def _rows(rotary: Rotary, tokens: slice) -> Rotary:
    return rotary._replace(cos=rotary.cos[..., tokens, :], sin=rotary.sin[..., tokens, :])


def _sequences(cu_seqlens: torch.Tensor, T: int) -> list[slice]:
    """The tokens of each sequence; at least one slice, so that the result knows its gradient."""
    if cu_seqlens.is_meta:
        return [slice(0, T)]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {T} tokens of q, got {bounds}.")
    return [slice(start, end) for start, end in pairwise(bounds)] or [slice(0, 0)]

"""The options of the operators as the kernels take them."""

from typing import NamedTuple

import torch

from .autocast import without_autocast
from .derived import derived
from .library import sum_dtype
from .rotary import Rotary


class Keys(NamedTuple):
    """weight `(B, Hk, M)`; mask `(B, M)`, 0 where a key is absent; total `(B,)` of those not."""

    weight: torch.Tensor | None
    mask: torch.Tensor | None
    total: torch.Tensor | None


def kernel_keys(
    k: torch.Tensor,
    key_weight: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    count: bool,
) -> Keys:
    """For k `(B, Hk, M, K)`; with cu_seqlens B is 1 and the count is of each sequence."""
    dtype = sum_dtype(k)
    if key_weight is not None:
        if key_mask is not None:
            # Selected, so that a masked weight gets a gradient of 0 whatever it is.
            there = key_mask if key_weight.dim() == 2 else key_mask[:, None]
            key_weight = torch.where(there, key_weight, 0)
        # First the type, so that the gradients of all heads are added before they are rounded.
        key_weight = key_weight.to(dtype)
        if key_weight.dim() == 2:
            key_weight = key_weight[:, None].expand(-1, k.shape[1], -1)
    total = None
    if count and cu_seqlens is not None:
        total = _count_of_sequences(key_mask, cu_seqlens).to(dtype)
    elif count and key_mask is not None:
        total = key_mask.sum(-1, dtype=dtype)
    if key_mask is not None:
        # In the width of k: a narrower load would change how Triton lays out the product's
        # operands, and float64 then does not compile.
        key_mask = key_mask.to(k.dtype)
    return Keys(key_weight, key_mask, total)


def _count_of_sequences(key_mask: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    if key_mask is None:
        return cu_seqlens.diff()
    until = torch.nn.functional.pad(key_mask[0].cumsum(0), (1, 0))
    return until[cu_seqlens].diff()


def kernel_columns(scale: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """1 / softplus(scale) `(H, K)`, what the channels of the focused map are multiplied by."""
    dtype = sum_dtype(q)
    if scale is None:
        return q.new_ones(q.shape[1], q.shape[3], dtype=dtype)
    with without_autocast(q):
        return torch.nn.functional.softplus(scale.to(dtype)).reciprocal().contiguous()


def kernel_shift(key_positions: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor | None:
    """key_positions `(H, M, K)` as tokens `(M, H, K)`, contiguous and in the dtype of k."""
    if key_positions is None:
        return None
    return key_positions.transpose(0, 1).to(k.dtype).contiguous()


def kernel_table(rotary: Rotary | None, q: torch.Tensor) -> tuple[torch.Tensor | None, str]:
    """cos and sin `(1 or H, N, K)` in the order of the channels, and the name of that order.

    For 16-bit q in float16: finer than q, and half the bytes of float32.
    """
    if rotary is None:
        return None, "none"
    dtype = q.dtype if q.dtype.itemsize > 2 else torch.float16
    cos, sin, interleaved = rotary
    table = derived(lambda: _table(cos, sin, interleaved, dtype), (interleaved, dtype), cos, sin)
    return table, "interleaved" if interleaved else "halves"


def _table(
    cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dtype: torch.dtype
) -> torch.Tensor:
    table = torch.stack((cos, sin), -1).flatten(-2) if interleaved else torch.cat((cos, sin), -1)
    table = table.to(dtype)
    return table if table.dim() == 3 else table[None]

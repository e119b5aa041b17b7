"""The second stage of a state: partial sums added in a fixed order."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel
from .programs import bound
from .tiling import Tiling

BLOCK = 512


@kernel
def sum_splits_kernel(
    partial, state, splits: "i32",
    SIZE: tl.constexpr, ROW: tl.constexpr, STATE_ROW: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    blocks = (SIZE + BLOCK - 1) // BLOCK
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_s = tl.arange(0, 8)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i_s in range(0, splits, 8):
        row = (i_bh * splits + i_s + o_s)[:, None] * ROW + o[None, :]
        mask = (i_s + o_s < splits)[:, None] & (o < SIZE)[None, :]
        total += tl.sum(tl.load(partial + row, mask=mask, other=0.0), 0)
    tl.store(state + i_bh * STATE_ROW + o, total, mask=o < SIZE)


@kernel
def sum_sequences_kernel(
    partial, cu, state, H: "i32", group: "i32", N: "i32", chunk: "i32",
    SIZE: tl.constexpr, ROW: tl.constexpr, STATE_ROW: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    blocks = (SIZE + BLOCK - 1) // BLOCK
    i_xh = tl.program_id(0).to(tl.int64) // blocks
    i_x, i_h = (i_xh // (H // group)).to(tl.int32), (i_xh % (H // group)).to(tl.int32)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    begin = bound(cu, i_x, N)
    slots = (bound(cu, i_x + 1, N) - begin + chunk - 1) // chunk
    first = begin // chunk + i_x
    total = tl.zeros((BLOCK,), dtype=ACC)
    for i_t in range(0, slots * group, 8):
        o_t = i_t + tl.arange(0, 8)
        row = (first + o_t // group).to(tl.int64) * H + i_h * group + o_t % group
        mask = (o_t < slots * group)[:, None] & (o < SIZE)[None, :]
        terms = tl.load(partial + row[:, None] * ROW + o[None, :], mask=mask, other=0.0)
        total += tl.sum(terms, 0)
    tl.store(state + i_xh * STATE_ROW + o, total, mask=o < SIZE)


class Rows(NamedTuple):
    """How many numbers a row has, and the strides of the rows of partial sums and of the state."""

    size: int
    partial: int
    state: int

    @property
    def constants(self) -> dict[str, int]:
        return {"SIZE": self.size, "ROW": self.partial, "STATE_ROW": self.state, "BLOCK": BLOCK}


@lru_cache(maxsize=1024)
def plan_sum_splits(states: int, splits: int, rows: Rows, dtype: torch.dtype) -> Launch:
    return Launch(
        sum_splits_kernel,
        (states * triton.cdiv(rows.size, BLOCK), 1),
        (splits,),
        {**rows.constants, "ACC": Tiling.acc(dtype)},
        {"num_warps": 4, "num_stages": 1},
    )


@lru_cache(maxsize=1024)
def plan_sum_sequences(
    states: int, heads: int, group: int, tokens: int, chunk: int, rows: Rows, dtype: torch.dtype
) -> Launch:
    return Launch(
        sum_sequences_kernel,
        (states * triton.cdiv(rows.size, BLOCK), 1),
        (heads, group, tokens, chunk),
        {**rows.constants, "ACC": Tiling.acc(dtype)},
        {"num_warps": 4, "num_stages": 1},
    )


def sum_partial(
    partial: torch.Tensor,
    key_heads: int,
    cu_seqlens: torch.Tensor | None,
    chunk: int,
    tokens: int,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    """State `(B * Hk, size)` of partial sums `(B, H, splits, size)`; written to `state` if given.

    Packed, `(S * Hk, size)` of `(slots, H, size)`. The query heads that share a key head lie side
    by side, and are added too.
    """
    H, size = partial.shape[1], partial.shape[-1]
    group = H // key_heads
    packed = cu_seqlens is not None
    states = (cu_seqlens.shape[0] - 1 if packed else partial.shape[0]) * key_heads
    splits = 0 if packed else group * partial.shape[2]
    if splits == 1 and state is None:
        return partial.view(states, size)
    if state is None:
        state = partial.new_empty(states, size)
    rows = Rows(size, partial.stride(-2), state.stride(0))
    if cu_seqlens is None:
        plan_sum_splits(states, splits, rows, partial.dtype)(partial, state)
    else:
        plan_sum_sequences(states, H, group, tokens, chunk, rows, partial.dtype)(
            partial, cu_seqlens, state
        )
    return state

"""What comes with queries, or with keys, beside the tensor itself."""

from typing import NamedTuple

import torch


class SidePlan(NamedTuple):
    """What a launch depends on of a `Side`."""

    weight: tuple[int, ...]
    mask: tuple[int, ...]
    table: int
    rotary: str
    sequences: int
    power: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """The strides of weight and mask, and that of the table from head to head in tokens."""
        return (*self.weight, *self.mask, self.table)

    def programs(self, rows: int, heads: int, tokens: int, chunk: int, splits: int) -> int:
        """How many programs go over `chunk` tokens each; see `programs.py`."""
        if self.sequences == 0:
            return rows * splits
        return heads * (tokens // chunk + self.sequences)


class Side(NamedTuple):
    """The options of the queries or of the keys, `(B, H, N, K)`, as the kernels take them.

    shift: `(N, H, K)`, contiguous, in the dtype of the keys, which it is added to.
    weight: `(B, H, N)`. mask: `(B, N)` in the dtype of the keys, 0 where there is none.
    table: cos and sin `(1 or H, N, K)`, contiguous, in the order that `rotary` says: "interleaved"
    or "halves".
    cu_seqlens: int32 `(sequences + 1,)`; B is 1 then.
    rows, columns: of the focused map, `(B, 3, N)` and `(H, K)`, with its `power`.
    """

    shift: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    table: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    rotary: str = "none"
    power: float = 1.0

    @property
    def plan(self) -> SidePlan:
        if self is PLAIN:
            return PLAIN_PLAN
        return SidePlan(
            (0, 0, 0) if self.weight is None else self.weight.stride(),
            (0, 0) if self.mask is None else self.mask.stride(),
            self.table.shape[1] if self.table is not None and self.table.shape[0] > 1 else 0,
            self.rotary,
            0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1,
            self.power,
        )

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """As the kernels take them."""
        return self[:7]


PLAIN = Side()
PLAIN_PLAN = SidePlan((0, 0, 0), (0, 0), 0, "none", 0, 1.0)

"""What the keys and values of a head come down to, and all that a query needs of them."""

from typing import NamedTuple, NoReturn

import torch


class State(NamedTuple):
    """The sums of linear attention over a set of keys.

        kv = sum_j w_j k~_j^T v_j          key_sum = sum_j w_j phi(k_j)          count = sum_j 1

    `+` joins the states of disjoint sets of keys: tiles of a picture, a stream, the shards of a
    long sequence on several GPUs (an all-reduce of the three tensors).

    Attributes:
        kv: `(B, H, K, V)`, with rotated features where there is a rotary. float32, as the other
            two (float64 for float64 inputs).
        key_sum: `(B, H, K)`, never rotated.
        count: `(B,)`, the number of keys that are there, for normalizer "mean".

    Example:
        >>> sums = State(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), torch.tensor([3.0]))
        >>> (sums + sums).count
        tensor([6.])
    """

    kv: torch.Tensor
    key_sum: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # tuple has a method of that name

    def __add__(self, other: object) -> "State":  # type: ignore[override]
        """The state of both sets of keys; never the concatenation of two tuples."""
        if not isinstance(other, State):
            raise TypeError(f"A State can be added to a State alone, got {type(other).__name__}.")
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise ValueError(
                    f"States that are added must have the same shapes and dtypes, got {name} of "
                    f"{tuple(mine.shape)} {mine.dtype} and {tuple(theirs.shape)} {theirs.dtype}."
                )
        return State(self.kv + other.kv, self.key_sum + other.key_sum, self.count + other.count)

    def __radd__(self, other: object) -> NoReturn:
        raise TypeError(f"A State can be added to a State alone, got {type(other).__name__}.")

"""Which GroupNorms are one launch, a program a group: those that one multiprocessor soon reads."""

import math
from collections.abc import Sequence

# Elements of a group.
LONGEST = 65536


def is_short(shape: Sequence[int], groups: int) -> bool:
    """Of x `(B, C, ...)`; the size of the batch does not enter."""
    return math.prod(shape[1:]) <= LONGEST * groups

"""Where gradients of the parts of a projection belong in that of the whole, as `parts` puts them.

Who computes the gradient of a part asks in the forward pass for its place, and in the backward pass
for the memory there. Until the gradient of the whole is made each place is given once, that of a
part with two gradients to neither: what was given is not written again, as anybody may hold it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .layout import empty_like_order

# Views of a whole part, whose gradients' memory is that of its own.
_VIEWS = {"ViewBackward0", "TransposeBackward0", "PermuteBackward0"}


class Whole(Protocol):
    """A node of the graph, which makes parts.

    Attributes:
        shape: Of the whole, which is contiguous.
        memory, begin: Whose it is, and where it begins there.
        starts, sizes: Of the parts along the last axis.
        twice: The numbers of parts with two gradients.
        made: Of a backward pass its stream, the gradient, and whose place was given.
    """

    shape: torch.Size
    memory: int
    begin: int
    starts: list[int]
    sizes: tuple[int, ...]
    twice: tuple[int, ...]
    made: tuple[int | None, Tensor | None, set[int]]


class Place(NamedTuple):
    """The gradient of a part in that of the whole, as the part is viewed."""

    node: Whole
    part: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def gradient(self, like: Tensor) -> Tensor | None:
        """Memory for it, in a backward pass; None where somebody has that already."""
        whole = gradient_of(self.node, like)
        taken = self.node.made[2]
        if self.part in taken:
            return None
        taken.add(self.part)
        return whole.as_strided(self.shape, self.stride, self.offset)


def gradient_of(node: Whole, like: Tensor) -> Tensor:
    """Memory for that of the whole; others may have written there."""
    # On one stream, in whose order memory comes to be used again.
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else None
    known, gradient, _ = node.made
    if known != stream or gradient is None:
        gradient = like.new_empty(node.shape)
        node.made = stream, gradient, set()
    return gradient


def places(*tensors: Tensor | None) -> list[Place | None] | None:
    """Of those that are parts, however viewed; None if none is."""
    found = [None if x is None else _place(x) for x in tensors]
    return found if any(found) else None


def _place(x: Tensor) -> Place | None:
    node = _whole(x)
    if node is None:
        return None
    offset = int(x.storage_offset()) - node.begin
    # Somebody may have moved it.
    if x.untyped_storage().data_ptr() != node.memory or offset not in node.starts:
        return None
    part = node.starts.index(offset)
    return None if part in node.twice else Place(node, part, x.shape, x.stride(), offset)


def _whole(x: Tensor) -> Whole | None:
    """What has made the part that x is a view of."""
    node: Any = x.grad_fn
    # More views than that nobody takes.
    for _ in range(3):
        if node is None or hasattr(type(node), "_forward_cls"):
            break
        node = node.next_functions[0][0] if node.name() in _VIEWS else None
    made_by = getattr(type(node), "_forward_cls", None)
    return node if getattr(made_by, "is_whole", False) else None


def gradients_in(found: Sequence[Place | None], *tensors: Tensor) -> list[Tensor]:
    """Memory for the gradient of each, at its place or of its own."""
    made = [p and p.gradient(x) for p, x in zip(found, tensors, strict=True)]
    return [
        empty_like_order(x, x.shape[-1]) if dx is None else dx
        for dx, x in zip(made, tensors, strict=True)
    ]

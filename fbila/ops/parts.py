"""Parts of a projection, whose gradients are written where that of the whole has them.

After PyTorch's split the gradients of all parts are copied together, and where a part is used
twice, its two are added up before. Here a backward pass asks where the gradient of a part belongs,
and writes it there; what is made elsewhere is copied there, or added, once.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .autograd import direct, needs_gradient, ordinary
from .places import gradient_of
from .replay import replayed

# Elements of a whole from which copying takes longer than Python's part of not doing it.
FEWEST = 2**23


def parts(whole: Tensor, sizes: Sequence[int] | int, twice: Sequence[int] = ()) -> Sequence[Tensor]:
    """`whole.split(sizes, -1)`, or so many equal parts, and after that once more those of `twice`.

    Which of the parts, by their numbers, are used in two ways is said so that both gradients are
    added up at once. Gradients are gathered as said above where a large whole is contiguous on a
    GPU, by PyTorch elsewhere; that of a part may share memory with that of the whole. Gradients of
    gradients are PyTorch's.
    """
    if isinstance(sizes, int):
        sizes = sizes * [whole.shape[-1] // sizes]
    # What traces modules has no tensors here.
    known = isinstance(whole, Tensor) and needs_gradient(whole) and direct(whole)
    if known and whole.numel() >= FEWEST and whole.is_contiguous():
        return _Parts.apply(whole, tuple(sizes), tuple(twice))
    found = whole.split(tuple(sizes), -1)
    return tuple([found[i] for i in (*range(len(sizes)), *twice)])


class _Parts(torch.autograd.Function):
    """Keeps nothing. What it returns are views, which autograd lets nobody change in place.

    Its nodes have the attributes of a `places.Whole`.
    """

    is_whole = True

    @staticmethod
    def forward(ctx, whole, sizes, twice):
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.begin = whole.shape, whole.storage_offset()
        ctx.memory = whole.untyped_storage().data_ptr()
        ctx.sizes, ctx.twice = sizes, twice
        ctx.starts = [0, *accumulate(sizes[:-1])]
        ctx.made = None, None, set()
        found = whole.split(sizes, -1)
        return *found, *(whole.narrow(-1, ctx.starts[i], sizes[i]) for i in twice)

    @staticmethod
    def backward(ctx, *gradients):
        first, again = gradients[: len(ctx.sizes)], gradients[len(ctx.sizes) :]
        again = dict(zip(ctx.twice, again, strict=True))
        there = [x for x in gradients if x is not None]
        if not there:
            return None, None, None
        # With gradients enabled, gradients of gradients are wanted.
        if torch.is_grad_enabled() or not ordinary(*there):
            return _by_pytorch(ctx, first, again, there[0]), None, None
        whole = gradient_of(ctx, there[0])
        taken, ctx.made = ctx.made[2], (None, None, set())
        # What was given out and did not come back, or as another's, somebody may hold.
        if not all(_is(first[i], place) for i, place in _places(ctx, whole) if i in taken):
            whole = torch.empty_like(whole)
        for i, place in _places(ctx, whole):
            _fill(place, first[i], again.get(i))
        return whole, None, None


def _places(node, whole):
    """The number of each part, and where it is in the whole."""
    pairs = zip(node.starts, node.sizes, strict=True)
    return ((i, whole.narrow(-1, start, size)) for i, (start, size) in enumerate(pairs))


def _by_pytorch(node, first, again, like):
    """The gradient of the whole, by operations that can be differentiated."""
    sums = []
    for i, (one, size) in enumerate(zip(first, node.sizes, strict=True)):
        found = [x for x in (one, again.get(i)) if x is not None]
        sums.append(sum(found) if found else like.new_zeros(*node.shape[:-1], size))
    return torch.cat(sums, -1)


def _fill(place, one, other):
    """Has the sum of a part's gradients at its place, where one alone may be already."""
    found = [x for x in (one, other) if x is not None]
    if not found or not place.numel():
        place.zero_()
    elif not _is(found[0], place):
        put(*[None if x is None else _rows(x) for x in (place, *found, None)][:3])


def _is(x, place):
    if x is None:
        return False
    return x.data_ptr() == place.data_ptr() and x.stride() == place.stride()


def _rows(x):
    """`(R, C)` of `(..., C)`, contiguous along C: a view where its rows lie evenly."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


@replayed
def put(place, x, y):
    """place `(R, C)` = x, or x + y."""
    from .kernels.place import plan_place

    R, C = place.shape
    strides = [0 if t is None else t.stride(0) if R > 1 else C for t in (place, x, y)]
    plan_place(R, C, tuple(strides), x.dtype)(place, x, y)
    return ()

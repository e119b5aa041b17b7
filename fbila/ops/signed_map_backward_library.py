"""The gradients of `fbila::signed_map`, as a torch.library op.

`fbila::signed_map_backward`: dy and dopposite `(B, H, N, d)`, one of which may be None, x, addend
and table as they were given, and of which of these three a gradient is wanted -> dx, token-major
in memory, daddend and dtable, as addend and table; those that nobody wants are empty. The formulas
are in `kernels/signed_map_backward.py`. A kernel on CUDA, PyTorch elsewhere.
"""

import torch

from .autograd import refuse_second_derivative
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of
from .replay import replayed

LIBRARY.define(
    "signed_map_backward(Tensor? dy, Tensor? dopposite, Tensor x, Tensor? addend, Tensor? table, "
    "str kind, bool[3] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def empty_token_major(x: torch.Tensor) -> torch.Tensor:
    """As x `(B, H, N, d)`, in memory `(B, N, H, d)`."""
    B, H, N, d = x.shape
    return x.new_empty(B, N, H, d).transpose(1, 2)


def channels_together(x: torch.Tensor) -> torch.Tensor:
    """x `(B, H, N, d)`, copied where its channels do not lie side by side."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def added(x: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    return x if addend is None else x + addend.to(x.dtype).transpose(0, 1)


def rows_for(i, z, table, kind):
    """The rows of the table for x (i = 0) or -x (i = 1), which is z, as z is wide.

    s and p, or s of each element and nothing.
    """
    if table is None:
        return z.new_ones(()), None
    rows = table.to(z.dtype).unsqueeze(-2)
    if kind == "power":
        return rows[0], rows[1]
    return torch.where(z > 0, rows[2 * i], rows[2 * i + 1]), None


def empty_gradients(dy, dopposite, x, addend, table, kind, needs_grad):
    others = [
        t.new_empty(t.shape) if needed and t is not None else x.new_empty(0)
        for t, needed in zip((addend, table), needs_grad[1:], strict=True)
    ]
    return (empty_token_major(x) if needs_grad[0] else x.new_empty(0), *others)


def in_kernel(dy, dopposite, x, addend, table, kind, needs_grad):
    others = [False, *needs_grad[1:]]
    dx, daddend, dtable = empty_gradients(dy, dopposite, x, addend, table, kind, others)
    if not x.numel():
        dx = empty_token_major(x) if needs_grad[0] else dx
        return dx, daddend.zero_(), dtable.zero_()
    written, sums = launched(dy, dopposite, x, addend, table, kind, needs_grad)
    if daddend.numel():
        daddend.copy_(written.sum(0, dtype=sum_dtype(x)).transpose(0, 1))
    if dtable.numel():
        rows = sums.shape[1]
        dtable[:rows] = sums.sum(0)
        if rows < len(dtable):
            # An opposite that nothing came from.
            dtable[rows:] = 0
    return written if needs_grad[0] else dx, daddend, dtable


@replayed
def launched(dy, dopposite, x, addend, table, kind, needs_grad):
    """dx, and the sums of each program for dtable; empty where nobody asks for them.

    The gradient of the addend is a sum of dx, wanted or not.
    """
    from .kernels.signed_map_backward import plan_signed_map_backward

    to_x, to_addend, to_table = (
        needed and t is not None and t.numel() > 0
        for t, needed in zip((x, addend, table), needs_grad, strict=True)
    )
    x, dy, dopposite = (None if t is None else channels_together(t) for t in (x, dy, dopposite))
    held, saved = (None if t is None else t.contiguous() for t in (addend, table))
    launch, programs = plan_signed_map_backward(
        tuple(x.shape),
        # Of one that is missing no strides are read.
        tuple([(x if t is None else t).stride() for t in (x, dy, dopposite)]),
        dtypes_of(x, held, dy, dopposite, saved),
        kind,
    )
    written = empty_token_major(x) if to_x or to_addend else None
    rows = 2 if kind == "power" or dopposite is None else 4
    sums = None
    if to_table:
        sums = x.new_empty(programs, rows, *table.shape[1:], dtype=sum_dtype(x))
    launch(x, held, saved, dy, dopposite, written, sums)
    return tuple([x.new_empty(0) if t is None else t for t in (written, sums)])


def in_pytorch(dy, dopposite, x, addend, table, kind, needs_grad):
    gradients = empty_gradients(dy, dopposite, x, addend, table, kind, needs_grad)
    wide = added(x, addend).to(sum_dtype(x))
    dx = torch.zeros_like(wide)
    dtable = None if table is None else torch.zeros_like(table, dtype=wide.dtype)
    for i, dz in enumerate((dy, dopposite)):
        if dz is None:
            continue
        z, dz = (-wide if i else wide), dz.to(wide.dtype)
        a, b = rows_for(i, z, table, kind)
        u = z.abs() / a if kind == "power" else z.abs() * a
        m = u**b if kind == "power" else torch.expm1(u)
        constant = z == 0
        if x.dtype == torch.float16:
            constant = constant | (m > torch.finfo(x.dtype).max)
        # Selected, not multiplied: 0 * inf would be NaN.
        slope = b / a * u ** (b - 1) if kind == "power" else a * (m + 1)
        dx += (dz * slope).masked_fill(constant, 0) * (-1 if i else 1)
        if dtable is None:
            continue
        dm = dz * z.sign()
        if kind == "power":
            first = (-b / a * dm * m).masked_fill(constant, 0)
            second = (dm * m * u.log()).masked_fill(constant, 0)
            rows = dtable
        else:
            ds = (dm * z.abs() * (m + 1)).masked_fill(constant, 0)
            first, second = ds.where(z > 0, 0), ds.where(z < 0, 0)
            rows = dtable[2 * i :]
        rows[0] += first.sum((0, 2))
        rows[1] += second.sum((0, 2))
    found = (dx, dx.to(x.dtype).sum(0, dtype=dx.dtype).transpose(0, 1), dtable)
    for gradient, value in zip(gradients, found, strict=True):
        if gradient.numel():
            gradient.copy_(value)
    return gradients


LIBRARY.impl("signed_map_backward", in_kernel, "CUDA")
LIBRARY.impl("signed_map_backward", in_pytorch, "CPU")
torch.library.register_fake("fbila::signed_map_backward", empty_gradients, lib=LIBRARY)
inline("signed_map_backward", in_kernel)
refuse_second_derivative("signed_map_backward", "signed_map", "Use PyTorch's own for that.")

"""Elementwise maps that keep the sign of queries and keys, as a torch.library op.

    y = sign(x) m(|x|)        "power": m(a) = (a / s)^p        "expm1": m(a) = exp(s a) - 1

`fbila::signed_map`: x `(B, H, N, d)` -> y, and what the map makes of -x, each `(B, H, N, d)` and
token-major in memory; the second is empty unless `both` is set. Whatever is of a head and channel
is a row of table `(T, H, d)`: s and p > 0 for "power"; for "expm1" s of positive and of negative x,
and of positive and of negative -x, or of the first two alone. Without a table "expm1" has s = 1.
addend `(N, H, d)`, or None, is added to x before.

It is computed in float32 (float64), from x + addend as rounded to x's dtype, and rounded once. In
float16 m ends at 65504, where an infinite feature would make a whole row of attention NaN. It is
differentiable by all three, of which alone it keeps anything, with 0 where x is 0. A kernel on
CUDA, PyTorch elsewhere.
"""

import torch

from . import signed_map_backward_library as backward_library
from .autograd import differentiable_by, direct, needs_gradient
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dtypes_of
from .replay import replayed
from .signed_map_backward_library import added, channels_together, empty_token_major, rows_for

LIBRARY.define(
    "signed_map(Tensor x, Tensor? addend, Tensor? table, str kind, bool both) -> (Tensor, Tensor)"
)


def empty_results(x, addend, table, kind, both):
    if x.ndim != 4:
        raise ValueError(f"x must be (B, H, N, d), got {list(x.shape)}.")
    if kind not in ("power", "expm1") or (kind == "power" and table is None):
        raise ValueError(f"kind must be 'power', with a table, or 'expm1', got {kind!r}.")
    _, H, N, d = x.shape
    beside(x, (N, H, d), addend)
    if table is not None:
        beside(x, (4 if kind == "expm1" and both else 2, H, d), table)
    return empty_token_major(x), empty_token_major(x) if both else x.new_empty(0)


@replayed
def in_kernel(x, addend, table, kind, both):
    from .kernels.signed_map import plan_signed_map

    y, opposite = empty_results(x, addend, table, kind, both)
    if y.numel():
        x = channels_together(x)
        addend, table = (None if t is None else t.contiguous() for t in (addend, table))
        launch = plan_signed_map(tuple(x.shape), x.stride(), dtypes_of(x, addend, table), kind)
        launch(x, addend, table, y, opposite if both else None)
    return y, opposite


def in_pytorch(x, addend, table, kind, both):
    results = empty_results(x, addend, table, kind, both)
    wide = added(x, addend).to(sum_dtype(x))
    for i, y in enumerate(results[: 1 + both]):
        z = -wide if i else wide
        a, b = rows_for(i, z, table, kind)
        m = (z.abs() / a) ** b if kind == "power" else torch.expm1(z.abs() * a)
        if x.dtype == torch.float16:
            m = m.clamp(max=torch.finfo(x.dtype).max)
        y.copy_(torch.copysign(m, z))
    return results


class SignedMap(torch.autograd.Function):
    """`fbila::signed_map` and its gradients."""

    @staticmethod
    def forward(ctx, x, addend, table, kind, both):
        ctx.save_for_backward(x, addend, table)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        if direct(x, addend, table):
            y, opposite = in_kernel(x, addend, table, kind, both)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, opposite = torch.ops.fbila.signed_map(x, addend, table, kind, both)
        if not both:
            ctx.mark_non_differentiable(opposite)
        return y, opposite

    @staticmethod
    def backward(ctx, dy, dopposite):
        needed = list(ctx.needs_input_grad[:3])
        if dy is None and dopposite is None:
            return None, None, None, None, None
        tensors = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(tensors[0], dy, dopposite, *tensors[1:])
        run = backward_library.in_kernel if unseen else torch.ops.fbila.signed_map_backward
        gradients = run(dy, dopposite, *tensors, ctx.kind, needed)
        found = [g if want else None for g, want in zip(gradients, needed, strict=True)]
        return (*found, None, None)


LIBRARY.impl("signed_map", in_kernel, "CUDA")
LIBRARY.impl("signed_map", in_pytorch, "CPU")
differentiable_by("signed_map", SignedMap.apply, in_kernel)
inline("signed_map", in_kernel)
torch.library.register_fake("fbila::signed_map", empty_results, lib=LIBRARY)


def signed_map(
    x: torch.Tensor,
    addend: torch.Tensor | None,
    table: torch.Tensor | None,
    kind: str,
    both: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fbila::signed_map`, straight away where nothing stands in between."""
    if not direct(x, addend, table):
        return torch.ops.fbila.signed_map(x, addend, table, kind, both)
    run = SignedMap.apply if needs_gradient(x, addend, table) else in_kernel
    return run(x, addend, table, kind, both)

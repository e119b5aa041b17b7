"""What ends MALA: attention made sharper for tokens of large queries, by a kernel either way.

    y_i = (1 + eps + s_i) a_i - s_i mean_j v_j

PyTorch writes every sum and product of it to memory, forward and backward. Here a, y and their
gradients are read and written once. That of v is one row for all tokens of a head.
"""

import torch
from torch import Tensor

from .autograd import direct, needs_gradient, ordinary
from .layout import empty_like_order, in_order_of, is_channels_first, is_token_major
from .library import sum_dtype
from .memory_format import dtypes_of
from .replay import replayed

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# The widest head that is a tile.
_WIDEST = 2048


def with_magnitude(a: Tensor, s: Tensor, v: Tensor, eps: float) -> Tensor:
    """y `(B, H, N, d)` of a of that shape, s `(B, H, N, 1)` and v `(B, H, M, d)`.

    By kernels in eager mode on a GPU, PyTorch elsewhere. They compute in float32, or float64 where
    a is; y is in the memory order of a. Gradients of gradients are PyTorch's.
    """
    # What traces modules has no tensors here.
    if isinstance(a, Tensor) and direct(a, s, v) and _fit(a, s, v):
        if needs_gradient(a, s, v):
            return _WithMagnitude.apply(a, s, v, eps)
        return in_kernel(a, s, _mean(v), eps)
    return (1 + eps + s) * a - s * v.mean(2, keepdim=True)


def _fit(a: Tensor, s: Tensor, v: Tensor) -> bool:
    """Whether nothing is broadcast but s and the mean, and all of it is of one kind."""
    return (
        a.dim() == v.dim() == 4
        and s.shape == (*a.shape[:3], 1)
        and v.shape == (*a.shape[:2], v.shape[2], a.shape[3])
        and a.dtype is s.dtype is v.dtype
        and a.dtype in _DTYPES
        and a.numel() > 0
        and v.numel() > 0
        and a.shape[3] <= _WIDEST
        and a.get_device() == s.get_device() == v.get_device()
    )


def _mean(v: Tensor) -> Tensor:
    return v.mean(2, keepdim=True, dtype=sum_dtype(v))


class _WithMagnitude(torch.autograd.Function):
    """Keeps what the wanted gradients read; v, for gradients of gradients, which find its mean."""

    @staticmethod
    def forward(ctx, a, s, v, eps):
        need_a, need_s, need_v, _ = ctx.needs_input_grad
        mean = _mean(v)
        ctx.save_for_backward(
            a if need_s else None,
            s if need_a or need_v else None,
            mean if need_s else None,
            v if need_s and need_v else None,
        )
        ctx.options = eps, v.shape[2], need_a, need_v
        return in_kernel(a, s, mean, eps)

    @staticmethod
    def backward(ctx, dy):
        a, s, mean, v = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted.
        if not torch.is_grad_enabled() and ordinary(dy, a, s, mean):
            run = backward_in_kernel
        else:
            run, mean = by_pytorch, mean if v is None else _mean(v)
        found = iter(run(dy, a, s, mean, *ctx.options))
        _, keys, need_a, need_v = ctx.options
        da = next(found) if need_a else None
        ds = next(found) if a is not None else None
        return da, ds, next(found).expand(-1, -1, keys, -1) if need_v else None, None


def _order(x: Tensor) -> str:
    if is_token_major(x):
        return "token_major"
    return "channels_first" if is_channels_first(x) else "head_major"


@replayed
def in_kernel(a, s, mean, eps):
    """y of a and s, which have elements, and the mean of v `(B, H, 1, d)`."""
    from .kernels.magnitude import plan_magnitude

    order, s, a = _order(a), in_order_of(a, s), in_order_of(a, a)
    mean, y = mean.contiguous(), torch.empty_like(a)
    plan_magnitude(tuple(a.shape), order, dtypes_of(a, s, mean, y), eps)(a, s, mean, y)
    return y


@replayed
def backward_in_kernel(dy, a, s, mean, eps, keys, need_a, need_v):
    """da if it is needed, ds if there is a, and if it is needed each value's gradient, of `keys`.

    The last is `(B, H, 1, d)`.
    """
    from .kernels.magnitude import plan_magnitude_backward

    B, H, _, d = dy.shape
    order, ds, dv, sums = _order(dy), None, None, None
    if a is not None:
        a, mean, ds = in_order_of(dy, a), mean.contiguous(), empty_like_order(dy, 1)
    if s is not None:
        s = in_order_of(dy, s)
    dy = in_order_of(dy, dy)
    da = torch.empty_like(dy) if need_a else None
    dtypes = dtypes_of(dy, a, s, mean, da, ds)
    launch, add_up, parts = plan_magnitude_backward(tuple(dy.shape), order, dtypes, eps, keys)
    if need_v:
        sums = dy.new_empty(B, parts, H, d, dtype=sum_dtype(dy))
    launch(dy, a, s, mean, da, ds, sums)
    if need_v:
        dv = dy.new_empty(B, H, 1, d)
        add_up(sums, None, dv)
    return [t for t in (da, ds, dv) if t is not None]


def by_pytorch(dy, a, s, mean, eps, keys, need_a, need_v):
    """The same, by operations that can be differentiated."""
    wide, found = dy.to(sum_dtype(dy)), []
    if need_a:
        found.append((wide * (1 + eps + s)).to(dy.dtype))
    if a is not None:
        found.append((wide * (a - mean)).sum(3, keepdim=True).to(dy.dtype))
    if need_v:
        found.append(((wide * s).sum(2, keepdim=True) / -keys).to(dy.dtype))
    return found

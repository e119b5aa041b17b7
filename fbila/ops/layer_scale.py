"""A residual with a scale for each channel, x + s y, whose training is a kernel either way.

PyTorch casts y where x is wider, as under autocast, and keeps the cast; its gradients are two
products, a cast and a sum. Here x, y and their gradients are read and written once, as they are.
"""

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .autograd import direct, needs_gradient, ordinary
from .library import sum_dtype
from .memory_format import dtypes_of
from .replay import replayed

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def add_scaled(x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """`torch.addcmul(x, scale, y)` of x and y `(..., C)` and scale `(C,)`.

    By kernels where gradients are wanted on a GPU, PyTorch elsewhere. They sum in float32, or
    float64 where the result is. Gradients of gradients are PyTorch's.
    """
    # What traces modules has no tensors here.
    if isinstance(x, Tensor) and needs_gradient(x, scale, y) and direct(x, scale, y):
        kinds, cast = {x.dtype, scale.dtype, y.dtype}, autocast_dtype(x)
        # Of others autocast makes something else, or nothing.
        served = kinds <= (_DTYPES if cast is None else {cast, torch.float32})
        if served and _fit(x, scale, y):
            return _AddScaled.apply(x, scale, y)
    return torch.addcmul(x, scale, y)


def _fit(x: Tensor, scale: Tensor, y: Tensor) -> bool:
    """Whether nothing is broadcast but scale over rows, and all of it is at one place."""
    return (
        x.shape == y.shape
        and scale.shape == x.shape[-1:]
        and scale.dim() == 1
        and x.numel() > 0
        and x.get_device() == scale.get_device() == y.get_device()
    )


class _AddScaled(torch.autograd.Function):
    """Keeps scale and y alone, and of these what the wanted gradients read."""

    @staticmethod
    def forward(ctx, x, scale, y):
        _, need_scale, need_y = ctx.needs_input_grad
        ctx.save_for_backward(scale if need_y else None, y if need_scale else None)
        ctx.dtypes = x.dtype, scale.dtype, y.dtype
        return in_kernel(x, scale, y)

    @staticmethod
    def backward(ctx, dz):
        scale, y = ctx.saved_tensors
        of_x, *others = ctx.dtypes
        dscale = dy = None
        if scale is not None or y is not None:
            # With gradients enabled, gradients of gradients are wanted.
            unseen = not torch.is_grad_enabled() and ordinary(dz, scale, y)
            found = (backward_in_kernel if unseen else by_pytorch)(dz, scale, y, *others)
            dy = None if scale is None else found[0]
            dscale = None if y is None else found[-1]
        return dz.to(of_x) if ctx.needs_input_grad[0] else None, dscale, dy


@replayed
def in_kernel(x, scale, y):
    """z of x and y of one shape, which have elements."""
    from .kernels.layer_scale import plan_add_scaled

    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), y.dtype)
    z, C = x.new_empty(x.shape, dtype=dtype), len(scale)
    run = plan_add_scaled(x.numel() // C, C, dtypes_of(z, x, scale, y))
    run(x.contiguous(), scale.contiguous(), y.contiguous(), z)
    return z


@replayed
def backward_in_kernel(dz, scale, y, of_scale, of_y):
    """dy if there is a scale, then dscale if there is y; of these dtypes."""
    from .kernels.layer_scale import plan_add_scaled_backward

    C = dz.shape[-1]
    dy = dscale = sums = None
    dz = dz.contiguous()
    if scale is not None:
        scale, dy = scale.contiguous(), dz.new_empty(dz.shape, dtype=of_y)
    if y is not None:
        y = y.contiguous()
    dtypes = dtypes_of(dz, scale, y, dy)
    launch, add_up, parts = plan_add_scaled_backward(dz.numel() // C, C, dtypes, of_scale)
    if y is not None:
        sums = dz.new_empty(parts, C, dtype=sum_dtype(dz))
    launch(dz, scale, y, dy, sums)
    if y is not None:
        dscale = dz.new_empty(C, dtype=of_scale)
        add_up(sums, None, dscale)
    return [t for t in (dy, dscale) if t is not None]


def by_pytorch(dz, scale, y, of_scale, of_y):
    """The same, by operations that can be differentiated."""
    found = []
    if scale is not None:
        found.append((dz * scale).to(of_y))
    if y is not None:
        found.append((dz * y).reshape(-1, y.shape[-1]).sum(0).to(of_scale))
    return found

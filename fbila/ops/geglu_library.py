"""GEGLU as a torch.library op.

`fbila::geglu`: x `(..., 2 D)` -> `(..., D)`, the first half times the GELU of the second, as
diffusers' feed-forward layers have it. For the gradient x alone is kept. A kernel on CUDA, PyTorch
elsewhere.
"""

import torch
import torch.nn.functional as F

from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .library import LIBRARY, sum_dtype

LIBRARY.define("geglu(Tensor x) -> Tensor")
LIBRARY.define("geglu_backward(Tensor dy, Tensor x) -> Tensor")


def empty_half(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"The last axis of x must be two halves, got {list(x.shape)}.")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def in_kernel(x):
    from .kernels.geglu import launch_geglu

    y = empty_half(x)
    if y.numel():
        launch_geglu(x.contiguous(), y)
    return y


def in_pytorch(x):
    y = empty_half(x)
    a, g = x.to(sum_dtype(x)).chunk(2, -1)
    return y.copy_(a * F.gelu(g))


def backward_in_kernel(dy, x):
    from .kernels.geglu import launch_geglu_backward

    dx = empty_like_x(dy, x)
    if dx.numel():
        launch_geglu_backward(x.contiguous(), dy.contiguous(), dx)
    return dx


def backward_in_pytorch(dy, x):
    a, g = x.to(sum_dtype(x)).chunk(2, -1)
    below = 0.5 * (1 + (g * 0.5**0.5).erf())
    slope = below + g * (-0.5 * g * g).exp() * (0.5 / torch.pi) ** 0.5
    return empty_like_x(dy, x).copy_(torch.cat((dy * g * below, dy * a * slope), -1))


def empty_like_x(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


class GEGLU(torch.autograd.Function):
    """`fbila::geglu` and its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        if direct(x):
            return in_kernel(x)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.geglu(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, x)
        return (backward_in_kernel if unseen else torch.ops.fbila.geglu_backward)(dy, x)


LIBRARY.impl("geglu", in_kernel, "CUDA")
LIBRARY.impl("geglu", in_pytorch, "CPU")
differentiable_by("geglu", GEGLU.apply, in_kernel)
LIBRARY.impl("geglu_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("geglu_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::geglu", empty_half, lib=LIBRARY)
torch.library.register_fake("fbila::geglu_backward", empty_like_x, lib=LIBRARY)
refuse_second_derivative("geglu_backward", "geglu", "Use PyTorch's own for that.")


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`fbila::geglu`, straight away where nothing stands in between."""
    if not direct(x):
        return torch.ops.fbila.geglu(x)
    return GEGLU.apply(x) if needs_gradient(x) else in_kernel(x)

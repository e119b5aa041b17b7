"""A gate with SiLU as a torch.library op: `fbila::silu_gate`, y = x SiLU(g).

x, g and y have one shape and dtype. Where PyTorch keeps x, g and SiLU(g) for the gradient, this
keeps x and g. A kernel on CUDA, PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F

from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .gated_conv_backward_library import slope
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .replay import replayed

LIBRARY.define("silu_gate(Tensor x, Tensor g) -> Tensor")
LIBRARY.define("silu_gate_backward(Tensor dy, Tensor x, Tensor g) -> (Tensor, Tensor)")


def empty_result(x, g):
    """y, uninitialised.

    Raises:
        ValueError: If x and g differ in shape or dtype.
    """
    if x.shape != g.shape or x.dtype != g.dtype:
        raise ValueError(
            f"x and g must have one shape and dtype, got {list(x.shape)} of {x.dtype} and "
            f"{list(g.shape)} of {g.dtype}."
        )
    return x.new_empty(x.shape)


@replayed
def in_kernel(x, g):
    from .kernels.silu_gate import plan_silu_gate

    y = empty_result(x, g)
    if y.numel():
        plan_silu_gate(y.numel(), x.dtype, False)(x.contiguous(), g.contiguous(), y)
    return y


def in_pytorch(x, g):
    wide = sum_dtype(x)
    return empty_result(x, g).copy_(x.to(wide) * F.silu(g.to(wide)))


def empty_gradients(dy, x, g):
    return x.new_empty(x.shape), g.new_empty(g.shape)


@replayed
def backward_in_kernel(dy, x, g):
    from .kernels.silu_gate import plan_silu_gate

    dx, dg = empty_gradients(dy, x, g)
    if dx.numel():
        run = plan_silu_gate(dx.numel(), x.dtype, True)
        run(x.contiguous(), g.contiguous(), dy.contiguous(), dx, dg)
    return dx, dg


def backward_in_pytorch(dy, x, g):
    wide = sum_dtype(x)
    dx, dg = empty_gradients(dy, x, g)
    dy, x, g = (t.to(wide) for t in (dy, x, g))
    return dx.copy_(dy * F.silu(g)), dg.copy_(dy * x * slope(g))


class SiluGate(torch.autograd.Function):
    """`fbila::silu_gate` and its gradients."""

    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        if direct(x, g):
            return in_kernel(x, g)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.silu_gate(x, g)

    @staticmethod
    def backward(ctx, dy):
        x, g = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, x, g)
        return (backward_in_kernel if unseen else torch.ops.fbila.silu_gate_backward)(dy, x, g)


LIBRARY.impl("silu_gate", in_kernel, "CUDA")
LIBRARY.impl("silu_gate", in_pytorch, "CPU")
differentiable_by("silu_gate", SiluGate.apply, in_kernel)
torch.library.register_fake("fbila::silu_gate", empty_result, lib=LIBRARY)
inline("silu_gate", in_kernel)
LIBRARY.impl("silu_gate_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("silu_gate_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::silu_gate_backward", empty_gradients, lib=LIBRARY)
inline("silu_gate_backward", backward_in_kernel)
refuse_second_derivative("silu_gate_backward", "silu_gate", "Use PyTorch's own for that.")


def silu_gate(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """`x SiLU(g)`: `fbila::silu_gate` on a GPU, straight away where nothing stands in between."""
    if not x.is_cuda or x.dtype != g.dtype or x.shape != g.shape:
        return x * F.silu(g)
    if not direct(x, g):
        return torch.ops.fbila.silu_gate(x, g)
    return (SiluGate.apply if needs_gradient(x, g) else in_kernel)(x, g)

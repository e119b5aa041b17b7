"""LayerNorm, alone or followed by LeakyReLU, as torch.library ops.

`fbila::layer_norm_leaky_relu`: x `(P, R, D)`, weight and bias `(P, D)` -> `(P, R, D)`. Each of P
sets of rows is normalised over D and has its own weight and bias, which may be wider than x. For
the gradient x alone is kept. A kernel on CUDA, PyTorch elsewhere.

`fbila::layer_norm`: x `(..., D)`, weight and bias `(D,)` or None -> `(..., D)` in x's dtype or
another, by the same kernel. For the gradients x, weight and bias are kept, and nothing else.
"""

import torch
import torch.nn.functional as F

from .autograd import (
    differentiable_by,
    direct,
    needs_gradient,
    refuse_second_derivative,
)
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dtypes_of
from .replay import replayed

_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, float eps, float slope"
LIBRARY.define(f"layer_norm_leaky_relu({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? dtype=None) "
    "-> Tensor"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps, "
    "bool[3] needs_grad) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"layer_norm_leaky_relu_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)


@replayed
def in_kernel(x, weight, bias, eps, slope):
    from .kernels.norm import launch_norm

    if x.numel() == 0:
        return x.new_empty(x.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return launch_norm(x, weight.contiguous(), bias.contiguous(), eps, slope)


def in_pytorch(x, weight, bias, eps, slope):
    wide = sum_dtype(x)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return F.leaky_relu(normed * weight[:, None].to(wide) + bias[:, None].to(wide), slope).to(
        x.dtype
    )


@replayed
def plain_in_kernel(x, weight, bias, eps, dtype=None):
    from .kernels.norm import plan_layer_norm

    weight, bias = beside(x, x.shape[-1:], weight, bias)
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if y.numel():
        plan_layer_norm(x.shape, x.dtype, dtypes_of(weight, bias, y), eps)(x, weight, bias, y)
    return y


def plain_in_pytorch(x, weight, bias, eps, dtype=None):
    wide = sum_dtype(x)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(dtype or x.dtype)


def empty_gradients(dy, x, weight, bias, eps, needs_grad):
    """Of x, weight and bias, uninitialised; without elements where none is wanted."""
    return tuple(
        [
            x.new_empty(t.shape, dtype=t.dtype) if needed and t is not None else x.new_empty(0)
            for t, needed in zip((x, weight, bias), needs_grad, strict=True)
        ]
    )


@replayed
def plain_backward_in_kernel(dy, x, weight, bias, eps, needs_grad):
    from .kernels.norm_backward import plan_grad_layer_norm, run

    gradients = empty_gradients(dy, x, weight, bias, eps, needs_grad)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    (weight,) = beside(x, x.shape[-1:], weight)
    x, dy = x.contiguous(), dy.contiguous()
    wanted = [t if t.numel() else None for t in gradients]
    others = dtypes_of(dy, weight, None, *wanted)
    run(plan_grad_layer_norm(x.shape, x.dtype, others, eps), x, dy, weight, None, *wanted)
    return gradients


def plain_backward_in_pytorch(dy, x, weight, bias, eps, needs_grad):
    gradients = empty_gradients(dy, x, weight, bias, eps, needs_grad)
    wide = sum_dtype(x)
    h, r = normalized(x, eps)
    dz = dy.to(wide)
    dx = grad_by_row(dz if weight is None else dz * weight, h, r)
    found = dx, *(t.reshape(-1, x.shape[-1]).sum(0) for t in (dz * h, dz))
    for gradient, t in zip(gradients, found, strict=True):
        if gradient.numel():
            gradient.copy_(t)
    return gradients


def normalized(x, eps):
    """x less its mean over its deviation, and 1 over that."""
    h = x.to(sum_dtype(x)) - x.mean(-1, keepdim=True, dtype=sum_dtype(x))
    r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    return h * r, r


def grad_by_row(dh, h, r):
    return r * (dh - dh.mean(-1, keepdim=True) - h * (dh * h).mean(-1, keepdim=True))


@replayed
def backward_in_kernel(dy, x, weight, bias, eps, slope):
    from .kernels.norm_backward import launch_grad_norm

    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dy))
    return launch_grad_norm(dy, x, weight.contiguous(), bias.contiguous(), eps, slope)


def backward_in_pytorch(dy, x, weight, bias, eps, slope):
    wide = sum_dtype(x)
    h, r = normalized(x, eps)
    w = weight[:, None].to(wide)
    dz = torch.where(h * w + bias[:, None] > 0, dy.to(wide), dy.to(wide) * slope)
    dx = grad_by_row(dz * w, h, r)
    return dx.to(x.dtype), (dz * h).sum(1).to(weight.dtype), dz.sum(1).to(bias.dtype)


class LayerNormLeakyReLU(torch.autograd.Function):
    """`fbila::layer_norm_leaky_relu` and its gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, eps, slope = inputs
        ctx.save_for_backward(*tensors)
        ctx.scalars = eps, slope
        if direct(*tensors):
            return in_kernel(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.layer_norm_leaky_relu(*inputs)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
        run = backward_in_kernel if unseen else torch.ops.fbila.layer_norm_leaky_relu_backward
        return (*run(dy, *tensors, *ctx.scalars), None, None)


LIBRARY.impl("layer_norm_leaky_relu", in_kernel, "CUDA")
LIBRARY.impl("layer_norm_leaky_relu", in_pytorch, "CPU")
differentiable_by("layer_norm_leaky_relu", LayerNormLeakyReLU.apply, in_kernel)
inline("layer_norm_leaky_relu", in_kernel)
LIBRARY.impl("layer_norm_leaky_relu_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("layer_norm_leaky_relu_backward", backward_in_pytorch, "CPU")
refuse_second_derivative("layer_norm_leaky_relu_backward", "layer_norm_leaky_relu")


class LayerNorm(torch.autograd.Function):
    """`fbila::layer_norm` and its gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        if direct(x, weight, bias):
            return plain_in_kernel(x, weight, bias, eps, dtype)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.layer_norm(x, weight, bias, eps, dtype)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
        run = plain_backward_in_kernel if unseen else torch.ops.fbila.layer_norm_backward
        gradients = run(dy, *tensors, ctx.eps, needed)
        found = [t if want else None for t, want in zip(gradients, needed, strict=True)]
        return (*found, None, None)


def plain_differentiable(x, weight, bias, eps, dtype=None):
    return LayerNorm.apply(x, weight, bias, eps, dtype)


LIBRARY.impl("layer_norm", plain_in_kernel, "CUDA")
LIBRARY.impl("layer_norm", plain_in_pytorch, "CPU")
differentiable_by("layer_norm", plain_differentiable, plain_in_kernel)
LIBRARY.impl("layer_norm_backward", plain_backward_in_kernel, "CUDA")
LIBRARY.impl("layer_norm_backward", plain_backward_in_pytorch, "CPU")
refuse_second_derivative("layer_norm_backward", "layer_norm", "Use PyTorch's own for that.")
torch.library.register_fake("fbila::layer_norm_backward", empty_gradients, lib=LIBRARY)


@torch.library.register_fake("fbila::layer_norm", lib=LIBRARY)
def _(x, weight, bias, eps, dtype=None):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("fbila::layer_norm_leaky_relu", lib=LIBRARY)
def _(x, weight, bias, eps, slope):
    return x.new_empty(x.shape)


@torch.library.register_fake("fbila::layer_norm_leaky_relu_backward", lib=LIBRARY)
def _(dy, x, weight, bias, eps, slope):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def layer_norm_leaky_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float
) -> torch.Tensor:
    """`fbila::layer_norm_leaky_relu`, straight away where nothing stands in between."""
    if not direct(x, weight, bias):
        return torch.ops.fbila.layer_norm_leaky_relu(x, weight, bias, eps, slope)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return LayerNormLeakyReLU.apply(x, weight, bias, eps, slope)
    return in_kernel(x, weight, bias, eps, slope)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`fbila::layer_norm`, straight away where nothing stands in between."""
    if direct(x):
        return layer_norm_directly(x, weight, bias, eps, dtype)
    return torch.ops.fbila.layer_norm(x, weight, bias, eps, dtype)


def layer_norm_directly(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """`layer_norm` of a `direct` x."""
    run = plain_differentiable if needs_gradient(x, weight, bias) else plain_in_kernel
    return run(x, weight, bias, eps, dtype)

"""A sum of tokens, its LayerNorm and a gate as a torch.library op.

    y = LayerNorm(x + s v) g

`fbila::gated_norm`: x, v and gate `(..., D)`, scale s `(heads,)`, of which each is for D / heads
channels, weight and bias `(D,)` -> y of the shape and the dtype of gate. What is read is read in
place where channels are contiguous and rows evenly apart. For the gradients the inputs are kept,
and nothing else. A kernel on CUDA for D of 1024 at most (512 of float64), PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of
from .norm_library import grad_by_row, normalized
from .replay import replayed

_ARGUMENTS = "Tensor x, Tensor v, Tensor gate, Tensor scale, Tensor weight, Tensor bias, float eps"
LIBRARY.define(f"gated_norm({_ARGUMENTS}) -> Tensor")
LIBRARY.define(
    f"gated_norm_backward(Tensor dy, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def empty_result(x, v, gate, scale, weight, bias, eps):
    """y, uninitialised.

    Raises:
        ValueError: For what the kernel would read wrongly.
    """
    D = x.shape[-1]
    if v.shape != x.shape or gate.shape != x.shape:
        raise ValueError(
            f"v and gate must have the shape of x, {list(x.shape)}, got {list(v.shape)} and "
            f"{list(gate.shape)}."
        )
    if weight.shape != (D,) or bias.shape != (D,) or scale.ndim != 1 or D % max(1, len(scale)):
        raise ValueError(
            f"weight and bias must be ({D},), and the length of scale must divide {D}; got "
            f"{list(weight.shape)}, {list(bias.shape)} and {list(scale.shape)}."
        )
    return gate.new_empty(gate.shape)


def rows(*tensors):
    """Each `(..., D)` as `(R, D)` with contiguous channels."""
    flat = [t.flatten(0, -2) if t.ndim > 1 else t[None] for t in tensors]
    return [t if t.stride(1) == 1 else t.contiguous() for t in flat]


@replayed
def in_kernel(x, v, gate, scale, weight, bias, eps):
    from .kernels.gated_norm import fits, plan_gated_norm

    y = empty_result(x, v, gate, scale, weight, bias, eps)
    if not y.numel():
        return y
    if not fits(x.shape[-1], x.dtype):
        return y.copy_(formula(x, v, gate, scale, weight, bias, eps))
    x, v, gate = rows(x, v, gate)
    scale, weight, bias = (t.contiguous() for t in (scale, weight, bias))
    strides = tuple([t.stride(0) for t in (x, v, gate)])
    tensors = (x, v, gate, scale, weight, bias, y)
    plan_gated_norm(x.shape, len(scale), strides, dtypes_of(*tensors), eps)(*tensors)
    return y


def in_pytorch(x, v, gate, scale, weight, bias, eps):
    y = empty_result(x, v, gate, scale, weight, bias, eps)
    return y.copy_(formula(x, v, gate, scale, weight, bias, eps))


def formula(x, v, gate, scale, weight, bias, eps):
    x, v, gate, scale, weight, bias = (
        t.to(sum_dtype(x)) for t in (x, v, gate, scale, weight, bias)
    )
    with without_autocast(x):
        a = x + v * scale.repeat_interleave(x.shape[-1] // len(scale))
        return F.layer_norm(a, a.shape[-1:], weight, bias, eps) * gate


def empty_gradients(dy, x, v, gate, scale, weight, bias, eps):
    return tuple([t.new_empty(t.shape) for t in (x, v, gate, scale, weight, bias)])


def backward_in_kernel(dy, x, v, gate, scale, weight, bias, eps):
    from .kernels.gated_norm import add_up, fits, plan_gated_norm

    tensors = x, v, gate, scale, weight, bias
    gradients = empty_gradients(dy, *tensors, eps)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    if not fits(x.shape[-1], x.dtype):
        return backward_in_pytorch(dy, *tensors, eps)
    dx, dv, dgate, dscale, dweight, dbias = gradients
    x, v, gate, dy = rows(x, v, gate, dy)
    scale, weight, bias = (t.contiguous() for t in (scale, weight, bias))
    strides = tuple([t.stride(0) for t in (x, v, gate, dy)])
    given = (x, v, gate, scale, weight, bias, dy, dx, dv, dgate)
    # As they are planned, dy is one of the first.
    kinds = dtypes_of(x, v, gate, dy, scale, weight, bias, dx, dv, dgate)
    launch = plan_gated_norm(x.shape, len(scale), strides, kinds, eps)
    sums = x.new_empty((launch.grid[0], 3, x.shape[1]), dtype=sum_dtype(x))
    launch(*given, sums)
    of_channels = sums.new_empty((x.shape[1], 2))
    add_up(sums, of_channels, dbias)
    dweight.copy_(of_channels[:, 0])
    dscale.copy_(of_channels[:, 1].view(len(scale), -1).sum(1))
    return gradients


def backward_in_pytorch(dy, x, v, gate, scale, weight, bias, eps):
    gradients = empty_gradients(dy, x, v, gate, scale, weight, bias, eps)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    wide = sum_dtype(x)
    D, heads = x.shape[-1], len(scale)
    s = scale.to(wide).repeat_interleave(D // heads)
    h, r = normalized(x.to(wide) + v.to(wide) * s, eps)
    dn = dy.to(wide) * gate.to(wide)
    da = grad_by_row(dn * weight, h, r)
    # Of each channel, of however many axes of tokens, or of none.
    ds, dweight, dbias = (t.reshape(-1, D).sum(0) for t in (da * v, dn * h, dn))
    found = (da, da * s, dy * (h * weight + bias), ds.view(heads, -1).sum(1), dweight, dbias)
    return tuple([t.copy_(f) for t, f in zip(gradients, found, strict=True)])


class GatedNorm(torch.autograd.Function):
    """`fbila::gated_norm` and its gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        if direct(*tensors):
            return in_kernel(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.gated_norm(*inputs)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
        run = backward_in_kernel if unseen else torch.ops.fbila.gated_norm_backward
        gradients = run(dy, *tensors, ctx.eps)
        wanted = ctx.needs_input_grad
        return (*[t if want else None for t, want in zip(gradients, wanted, strict=False)], None)


LIBRARY.impl("gated_norm", in_kernel, "CUDA")
LIBRARY.impl("gated_norm", in_pytorch, "CPU")
differentiable_by("gated_norm", GatedNorm.apply, in_kernel)
torch.library.register_fake("fbila::gated_norm", empty_result, lib=LIBRARY)
LIBRARY.impl("gated_norm_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("gated_norm_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::gated_norm_backward", empty_gradients, lib=LIBRARY)
refuse_second_derivative("gated_norm_backward", "gated_norm", "Use PyTorch's own for that.")


def gated_norm(
    x: Tensor, v: Tensor, gate: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`fbila::gated_norm`, straight away where nothing stands in between."""
    tensors = x, v, gate, scale, weight, bias
    if not direct(*tensors):
        return torch.ops.fbila.gated_norm(*tensors, eps)
    return (GatedNorm.apply if needs_gradient(*tensors) else in_kernel)(*tensors, eps)

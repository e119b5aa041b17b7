"""A depthwise convolution of tokens on a grid, and what is added to it, as a torch.library op.

    y = act(addend + bias + taps * x)

`fbila::depthwise_conv`: x `(B, H, W, C)`, weight `(T, 1, k, k)` with an odd k, bias `(T,)` or None,
addend `(B, H, W, C)` or None, or x itself where `residual`; T is C, or the channels of one head,
whose taps all heads share, or B C, where each sample has taps of its own. There are zeros around x.
`silu` says what act is, the identity or SiLU. y has the shape of x, in the wider dtype of x and
addend. x and addend are read in place where their channels are contiguous.

Local position encodings and the local branches beside linear attention are of this kind. It is
differentiable by all tensors but where act is SiLU. A kernel on CUDA for k = 3 and 5, PyTorch
elsewhere.
"""

import torch
import torch.nn.functional as F

from .autocast import cast_for_autocast, without_autocast
from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of

KERNEL_SIZES = (3, 5)

LIBRARY.define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, bool residual, "
    "bool silu) -> Tensor"
)
LIBRARY.define(
    "depthwise_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool residual, "
    "bool[3] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def empty_result(x, weight, bias, addend, residual=False, silu=False):
    """y, uninitialised.

    Raises:
        ValueError: For what the kernel would read wrongly.
    """
    B, _, _, C = x.shape
    T, k = weight.shape[0], weight.shape[-1]
    if weight.shape != (T, 1, k, k) or k % 2 == 0 or not (T == B * C or (T > 0 and C % T == 0)):
        raise ValueError(
            f"weight must be (T, 1, k, k), with an odd k and a T that divides {C} channels or is "
            f"{B * C}, got {list(weight.shape)}."
        )
    if bias is not None and bias.shape != (T,):
        raise ValueError(f"bias must be ({T},) as weight has {T} rows, got {list(bias.shape)}.")
    if addend is not None and addend.shape != x.shape:
        raise ValueError(
            f"addend must have the shape of x, {list(x.shape)}, got {list(addend.shape)}."
        )
    return x.new_empty(x.shape, dtype=None if addend is None else wider(x, addend))


def wider(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, y.dtype)


def beside(x: torch.Tensor | None) -> torch.Tensor | None:
    """x `(B, H, W, C)` with contiguous channels."""
    if x is None or x.stride(3) == 1 or x.shape[3] == 1:
        return x
    return x.contiguous()


def in_kernel(x, weight, bias, addend, residual, silu):
    from .kernels.depthwise_conv import plan_depthwise_conv

    addend = x if residual else addend
    y = empty_result(x, weight, bias, addend)
    if not y.numel():
        return y
    if weight.shape[-1] not in KERNEL_SIZES:
        return y.copy_(convolution(x, weight, bias, addend, silu))
    x, addend = beside(x), beside(addend)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    plan_depthwise_conv(
        x.shape,
        x.stride(),
        None if addend is None else addend.stride(),
        weight.shape[-1],
        len(weight),
        False,
        silu,
        dtypes_of(x, weight, bias, addend, y),
    )(x, weight, bias, addend, y)
    return y


def in_pytorch(x, weight, bias, addend, residual, silu):
    addend = x if residual else addend
    y = empty_result(x, weight, bias, addend)
    return y.copy_(convolution(x, weight, bias, addend, silu)) if y.numel() else y


def convolution(x, weight, bias, addend, silu):
    wide = sum_dtype(x)
    B, H, W, C = x.shape
    with without_autocast(x):
        picture, weight, bias, groups = as_picture(x.to(wide), weight.to(wide), bias)
        y = F.conv2d(picture, weight, bias, padding=weight.shape[-1] // 2, groups=groups)
        y = y.view(B, C, H, W).permute(0, 2, 3, 1)
        y = y if addend is None else y + addend
        return F.silu(y) if silu else y


def as_picture(x, weight, bias):
    """What `F.conv2d` takes in place of x, weight and bias, and the groups."""
    B, H, W, C = x.shape
    bias = None if bias is None else bias.to(x.dtype)
    if len(weight) <= C:
        heads = C // len(weight)
        bias = None if bias is None else bias.repeat(heads)
        return x.permute(0, 3, 1, 2).contiguous(), weight.repeat(heads, 1, 1, 1), bias, C
    return x.permute(0, 3, 1, 2).reshape(1, B * C, H, W), weight, bias, B * C


def empty_gradients(dy, x, weight, bias, residual, needs_grad):
    return tuple(
        [
            t.new_empty(t.shape) if needed and t is not None else x.new_empty(0)
            for t, needed in zip((x, weight, bias), needs_grad, strict=True)
        ]
    )


def backward_in_kernel(dy, x, weight, bias, residual, needs_grad):
    from .kernels.depthwise_conv import plan_depthwise_conv
    from .kernels.depthwise_conv_sums import plan_depthwise_conv_sums

    if weight.shape[-1] not in KERNEL_SIZES:
        return backward_in_pytorch(dy, x, weight, bias, residual, needs_grad)
    gradients = empty_gradients(dy, x, weight, bias, residual, needs_grad)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    dx, dweight, dbias = (t if t.numel() else None for t in gradients)
    dy = beside(dy)
    k, sets = weight.shape[-1], len(weight)
    if dx is not None:
        addend = dy if residual else None
        dtypes = dtypes_of(dy, weight, None, addend, dx)
        stride = dy.stride() if residual else None
        run = plan_depthwise_conv(dy.shape, dy.stride(), stride, k, sets, True, False, dtypes)
        run(dy, weight.contiguous(), None, addend, dx)
    if dweight is not None or dbias is not None:
        x = beside(x)
        launch, add_up, shape = plan_depthwise_conv_sums(
            x.shape, x.stride(), dy.stride(), k, sets, dtypes_of(x, dy, dweight, dbias)
        )
        sums = x.new_empty(shape, dtype=sum_dtype(x))
        launch(x, dy, sums)
        add_up(sums, dweight, dbias)
    return gradients


def backward_in_pytorch(dy, x, weight, bias, residual, needs_grad):
    gradients = empty_gradients(dy, x, weight, bias, residual, needs_grad)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    wide = sum_dtype(x)
    T, k = len(weight), weight.shape[-1]
    B, H, W, C = x.shape
    with without_autocast(x):
        picture, taps, _, groups = as_picture(x.to(wide), weight.to(wide), None)
        of_picture = as_picture(dy.to(wide), weight, None)[0]
        one, side = [1, 1], [k // 2, k // 2]
        mask = [needs_grad[0], needs_grad[1], needs_grad[2] and bias is not None]
        dx, dtaps, dbias = torch.ops.aten.convolution_backward(
            of_picture, picture, taps, [groups], one, side, one, False, [0, 0], groups, mask
        )
    if gradients[0].numel():
        dx = dx.view(B, C, H, W).permute(0, 2, 3, 1)
        gradients[0].copy_(dx + dy if residual else dx)
    # Of taps that heads share, over heads.
    for gradient, found in zip(gradients[1:], (dtaps, dbias), strict=True):
        if gradient.numel():
            gradient.copy_(found.unflatten(0, (-1, T)).sum(0))
    return gradients


class DepthwiseConv(torch.autograd.Function):
    """`fbila::depthwise_conv` and its gradients; it keeps x and weight alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, addend, residual, silu):
        if silu and any(ctx.needs_input_grad):
            raise NotImplementedError("depthwise_conv with SiLU has no gradient.")
        ctx.save_for_backward(x, weight, bias)
        ctx.residual, ctx.addend = residual, None if addend is None else addend.dtype
        if direct(x, weight, bias, addend):
            return in_kernel(x, weight, bias, addend, residual, silu)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.depthwise_conv(x, weight, bias, addend, residual, silu)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        gradients = (None, None, None)
        if any(needed):
            # With gradients enabled, gradients of gradients are wanted, which the op refuses.
            unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
            run = backward_in_kernel if unseen else torch.ops.fbila.depthwise_conv_backward
            gradients = run(dy, *tensors, ctx.residual, needed)
        daddend = dy.to(ctx.addend) if ctx.needs_input_grad[3] else None
        found = [t if want else None for t, want in zip(gradients, needed, strict=True)]
        return (*found, daddend, None, None)


LIBRARY.impl("depthwise_conv", in_kernel, "CUDA")
LIBRARY.impl("depthwise_conv", in_pytorch, "CPU")
differentiable_by("depthwise_conv", DepthwiseConv.apply, in_kernel)
torch.library.register_fake("fbila::depthwise_conv", empty_result, lib=LIBRARY)
inline("depthwise_conv", in_kernel)
LIBRARY.impl("depthwise_conv_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("depthwise_conv_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::depthwise_conv_backward", empty_gradients, lib=LIBRARY)
refuse_second_derivative("depthwise_conv_backward", "depthwise_conv", "Use PyTorch's own for that.")


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    *,
    silu: bool = False,
) -> torch.Tensor:
    """`fbila::depthwise_conv` on a GPU, straight away where nothing stands in between.

    Under autocast x is cast as PyTorch's own convolution casts it, and the addend is not.
    """
    if not x.is_cuda:
        y = as_pytorch_does(x, weight, bias)
        y = y if addend is None else addend + y
        return F.silu(y) if silu else y
    (x,) = cast_for_autocast(x)
    residual = addend is x
    if residual:
        addend = None
    wanted = needs_gradient(x, weight, bias, addend)
    if silu and wanted:
        return F.silu(depthwise_conv(x, weight, bias, x if residual else addend))
    if not direct(x, weight, bias, addend):
        return torch.ops.fbila.depthwise_conv(x, weight, bias, addend, residual, silu)
    run = DepthwiseConv.apply if wanted else in_kernel
    return run(x, weight, bias, addend, residual, silu)


def as_pytorch_does(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution alone, in the dtype of x or that of autocast."""
    B, H, W, C = x.shape
    padding, groups = weight.shape[-1] // 2, C
    picture = x.permute(0, 3, 1, 2)
    if len(weight) > C:
        # Each sample has taps of its own: all its channels are channels of one.
        picture, groups = picture.reshape(1, B * C, H, W), B * C
    elif len(weight) < C:
        heads = C // len(weight)
        weight = weight.repeat(heads, 1, 1, 1)
        bias = None if bias is None else bias.repeat(heads)
    y = F.conv2d(picture, weight, bias, padding=padding, groups=groups)
    return y.view(B, C, H, W).permute(0, 2, 3, 1)

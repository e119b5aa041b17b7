"""A depthwise convolution of tokens on a grid, and what is around it, as a torch.library op.

    y = act(taps * f(x) + bias + other) gate        other: addend, f(x) or nothing

`fbila::depthwise_conv`: x `(B, H, W, C)`, weight `(T, 1, k, k)` with an odd k, bias `(T,)` or None,
addend and gate `(B, H, W, C)` or None; T is C, or the channels of one head, whose taps all heads
share, or B C, where each sample has taps of its own. There are zeros around x. Of the options
`gelu` says what f is, the identity or GELU, `silu` what act is, the identity or SiLU, and
`residual` adds f(x). y has the shape of x, in the widest dtype of x, addend and gate. These are
read in place where their channels are contiguous.

Local position encodings and the local branches beside linear attention are of this kind. It is
differentiable by all tensors, but not with SiLU of an addend; of what it computes it keeps nothing:
the gradient by the gate is the same function, with the gradient of y for a gate.
A kernel on CUDA for k = 3 and 5, PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F

from .autocast import cast_for_autocast, stays, without_autocast
from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .gated_conv_backward_library import slope
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of
from .replay import replayed

KERNEL_SIZES = (3, 5)

_OPTIONS = "bool residual, bool gelu, bool silu"
LIBRARY.define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, Tensor? gate, "
    f"{_OPTIONS}) -> Tensor"
)
LIBRARY.define(
    "depthwise_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, "
    f"{_OPTIONS}, bool[3] needs_grad) -> (Tensor, Tensor, Tensor)"
)


def empty_result(x, weight, bias, addend, gate, *options):
    """y, uninitialised.

    Raises:
        ValueError: For what the kernel would read wrongly.
    """
    B, _, _, C = x.shape
    T, k = weight.shape[0], weight.shape[-1]
    # A number of samples that is a symbol is compared only where it has to be.
    if weight.shape != (T, 1, k, k) or k % 2 == 0 or not ((T > 0 and C % T == 0) or T == B * C):
        raise ValueError(
            f"weight must be (T, 1, k, k), with an odd k and a T that divides {C} channels or is "
            f"{B * C}, got {list(weight.shape)}."
        )
    if bias is not None and bias.shape != (T,):
        raise ValueError(f"bias must be ({T},) as weight has {T} rows, got {list(bias.shape)}.")
    dtype = x.dtype
    for name, t in (("addend", addend), ("gate", gate)):
        if t is None:
            continue
        if t.shape != x.shape:
            raise ValueError(
                f"{name} must have the shape of x, {list(x.shape)}, got {list(t.shape)}."
            )
        dtype = torch.promote_types(dtype, t.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def beside(x: torch.Tensor | None) -> torch.Tensor | None:
    """x `(B, H, W, C)` with contiguous channels."""
    if x is None or x.stride(3) == 1 or x.shape[3] == 1:
        return x
    return x.contiguous()


@replayed
def in_kernel(x, weight, bias, addend, gate, residual, gelu, silu):
    y = empty_result(x, weight, bias, addend, gate)
    if not y.numel():
        return y
    if weight.shape[-1] not in KERNEL_SIZES:
        return y.copy_(formula(x, weight, bias, addend, gate, residual, gelu, silu))
    end = "silu" if silu else ""
    run(y, x, weight, bias, addend, gate, residual=residual, gelu=gelu, end=end)
    return y


def run(y, x, weight, bias, other, gate=None, **options):
    """Fill y, as `kernels/depthwise_conv.py` says."""
    from .kernels.depthwise_conv import plan_depthwise_conv

    x, other, gate = beside(x), beside(other), beside(gate)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    strides = [None if t is None else t.stride() for t in (other, gate)]
    dtypes = dtypes_of(x, weight, bias, other, gate, y)
    plan_depthwise_conv(
        x.shape, x.stride(), *strides, weight.shape[-1], len(weight), dtypes, **options
    )(x, weight, bias, other, gate, y)


def in_pytorch(x, weight, bias, addend, gate, *options):
    y = empty_result(x, weight, bias, addend, gate)
    if not y.numel():
        return y
    return y.copy_(formula(x, weight, bias, addend, gate, *options))


def formula(x, weight, bias, addend, gate, residual, gelu, silu):
    wide = sum_dtype(x)
    with without_autocast(x):
        f = F.gelu(x.to(wide)) if gelu else x.to(wide)
        y = convolution(f, weight.to(wide), None if bias is None else bias.to(wide))
        y = y + f if residual else y
        y = y if addend is None else y + addend
        y = F.silu(y) if silu else y
        return y if gate is None else y * gate


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The convolution alone, by PyTorch, in the dtype of x or that of autocast."""
    B, H, W, C = x.shape
    picture, weight, bias, groups = as_picture(x, weight, bias)
    y = F.conv2d(picture, weight, bias, padding=weight.shape[-1] // 2, groups=groups)
    return y.view(B, C, H, W).permute(0, 2, 3, 1)


def as_picture(x, weight, bias):
    """What `F.conv2d` takes in place of x, weight and bias, and the groups."""
    B, H, W, C = x.shape
    picture = x.permute(0, 3, 1, 2)
    if len(weight) > C:
        # Each sample has taps of its own: all its channels are channels of one.
        return picture.reshape(1, B * C, H, W), weight, bias, B * C
    heads = C // len(weight)
    if heads > 1:
        weight = weight.repeat(heads, 1, 1, 1)
        bias = None if bias is None else bias.repeat(heads)
    return picture, weight, bias, C


def empty_gradients(dy, x, weight, bias, residual, gelu, silu, needs_grad):
    return tuple(
        [
            t.new_empty(t.shape) if needed and t is not None else x.new_empty(0)
            for t, needed in zip((x, weight, bias), needs_grad, strict=True)
        ]
    )


@replayed
def backward_in_kernel(dy, x, weight, bias, residual, gelu, silu, needs_grad):
    from .kernels.depthwise_conv_sums import plan_depthwise_conv_sums

    if weight.shape[-1] not in KERNEL_SIZES:
        return backward_in_pytorch(dy, x, weight, bias, residual, gelu, silu, needs_grad)
    gradients = empty_gradients(dy, x, weight, bias, residual, gelu, silu, needs_grad)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    dx, dweight, dbias = (t if t.numel() else None for t in gradients)
    x, dy = beside(x), beside(dy)
    if silu:
        dz = x.new_empty(x.shape)
        run(dz, x, weight, bias, dy, residual=residual, gelu=gelu, end="slope")
        dy = dz
    if dx is not None:
        options = {"other": x, "end": "gelu slope"} if gelu else {"other": None}
        run(dx, dy, weight, None, turned=True, residual=residual, **options)
    if dweight is not None or dbias is not None:
        dtypes = dtypes_of(x, dy, dweight, dbias)
        launch, add_up, shape = plan_depthwise_conv_sums(
            x.shape, x.stride(), dy.stride(), weight.shape[-1], len(weight), dtypes, gelu
        )
        sums = x.new_empty(shape, dtype=sum_dtype(x))
        launch(x, dy, sums)
        add_up(sums, dweight, dbias)
    return gradients


def backward_in_pytorch(dy, x, weight, bias, residual, gelu, silu, needs_grad):
    gradients = empty_gradients(dy, x, weight, bias, residual, gelu, silu, needs_grad)
    if not x.numel():
        return tuple([t.zero_() for t in gradients])
    wide = sum_dtype(x)
    T, k = len(weight), weight.shape[-1]
    B, H, W, C = x.shape
    dz, x, weight = (t.to(wide) for t in (dy, x, weight))
    with without_autocast(x):
        f = F.gelu(x) if gelu else x
        if silu:
            z = convolution(f, weight, None if bias is None else bias.to(wide))
            dz = dz * slope(z + f if residual else z)
        picture, taps, _, groups = as_picture(f.contiguous(), weight, None)
        of_picture = as_picture(dz.contiguous(), weight, None)[0]
        one, side = [1, 1], [k // 2, k // 2]
        mask = [needs_grad[0], needs_grad[1], needs_grad[2] and bias is not None]
        df, dtaps, dbias = torch.ops.aten.convolution_backward(
            of_picture, picture, taps, [groups], one, side, one, False, [0, 0], groups, mask
        )
    if gradients[0].numel():
        df = df.reshape(B, C, H, W).permute(0, 2, 3, 1)
        df = df + dz if residual else df
        gradients[0].copy_(df * gelu_slope(x) if gelu else df)
    # Of taps that heads share, over heads.
    for gradient, found in zip(gradients[1:], (dtaps, dbias), strict=True):
        if gradient.numel():
            gradient.copy_(found.unflatten(0, (-1, T)).sum(0))
    return gradients


def gelu_slope(x: torch.Tensor) -> torch.Tensor:
    """GELU's derivative."""
    below = 0.5 * (1 + (x * 0.5**0.5).erf())
    return below + x * (-0.5 * x * x).exp() * (0.5 / torch.pi) ** 0.5


class DepthwiseConv(torch.autograd.Function):
    """`fbila::depthwise_conv` and its gradients; it keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, addend, gate, *options):
        if options[2] and addend is not None and any(ctx.needs_input_grad):
            raise NotImplementedError("depthwise_conv with SiLU of an addend has no gradient.")
        ctx.save_for_backward(x, weight, bias, addend if ctx.needs_input_grad[4] else None, gate)
        ctx.options, ctx.addend = options, None if addend is None else addend.dtype
        if direct(x, weight, bias, addend, gate):
            return in_kernel(x, weight, bias, addend, gate, *options)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.depthwise_conv(x, weight, bias, addend, gate, *options)

    @staticmethod
    def backward(ctx, dy):
        *tensors, addend, gate = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        # With gradients enabled, gradients of gradients are wanted, which the backward op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors, addend, gate)
        dgate = None
        if ctx.needs_input_grad[4]:
            run = in_kernel if unseen else torch.ops.fbila.depthwise_conv
            dgate = run(*tensors, addend, dy, *ctx.options).to(gate.dtype)
        if gate is not None and any(ctx.needs_input_grad[:4]):
            dy = dy * gate
        gradients = (None, None, None)
        if any(needed):
            run = backward_in_kernel if unseen else torch.ops.fbila.depthwise_conv_backward
            gradients = run(dy, *tensors, *ctx.options, needed)
        daddend = dy.to(ctx.addend) if ctx.needs_input_grad[3] else None
        found = [t if want else None for t, want in zip(gradients, needed, strict=True)]
        return (*found, daddend, dgate, None, None, None)


LIBRARY.impl("depthwise_conv", in_kernel, "CUDA")
LIBRARY.impl("depthwise_conv", in_pytorch, "CPU")
differentiable_by("depthwise_conv", DepthwiseConv.apply, in_kernel)
torch.library.register_fake("fbila::depthwise_conv", empty_result, lib=LIBRARY)
inline("depthwise_conv", in_kernel)
LIBRARY.impl("depthwise_conv_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("depthwise_conv_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::depthwise_conv_backward", empty_gradients, lib=LIBRARY)
inline("depthwise_conv_backward", backward_in_kernel)
refuse_second_derivative("depthwise_conv_backward", "depthwise_conv", "Use PyTorch's own for that.")


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    *,
    residual: bool = False,
    gelu: bool = False,
    silu: bool = False,
) -> torch.Tensor:
    """`fbila::depthwise_conv` on a GPU, straight away where nothing stands in between.

    Under autocast the convolution alone is of the lower precision, as PyTorch's own, but beside a
    float32 f(x): then nothing is, as one kernel for all of it moves less than a cast does.
    """
    wanted = needs_gradient(x, weight, bias, addend, gate)
    # What no kernel is for: a gradient, and below f(x) of another precision than the convolution.
    apart = silu and addend is not None and wanted
    if not apart and direct(x, weight, bias, addend, gate) and stays(x):
        run = DepthwiseConv.apply if wanted else in_kernel
        return run(x, weight, bias, addend, gate, residual, gelu, silu)
    narrow = x if residual and x.dtype == torch.float32 else cast_for_autocast(x)[0]
    apart = apart or ((gelu or residual) and narrow.dtype != x.dtype)
    if apart or not x.is_cuda:
        f = F.gelu(x) if gelu else x
        y = (depthwise_conv if x.is_cuda else convolution)(f, weight, bias)
        y = f + y if residual else y
        y = y if addend is None else addend + y
        y = F.silu(y) if silu else y
        return y if gate is None else y * gate
    x, options = narrow, (residual, gelu, silu)
    if not direct(x, weight, bias, addend, gate):
        return torch.ops.fbila.depthwise_conv(x, weight, bias, addend, gate, *options)
    run = DepthwiseConv.apply if wanted else in_kernel
    return run(x, weight, bias, addend, gate, *options)

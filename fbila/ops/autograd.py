"""Differentiation: which passes make up forward and backward, and what is kept between them.

Kept are q, k, v (the inputs themselves), the state, `K * V + K` numbers a head, and one number a
token and head, the inverse of its denominator: nothing of the size of q.
"""

from collections.abc import Callable

import torch

from . import library
from .inlining import inline
from .library import LIBRARY
from .places import gradients_in, places

_ORDINARY = {torch.Tensor, torch.nn.Parameter}
# By names of their own, which are found sooner: a step asks hundreds of times.
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad
# Many gradients, as in `torch.autograd.grad(..., is_grads_batched=True)`.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def ordinary(*tensors: torch.Tensor | None) -> bool:
    """Whether calls on `tensors` need no dispatcher: no graph is traced and nobody looks on.

    The dispatcher's way to a Python implementation takes longer than launching the kernels.
    """
    if (
        _is_compiling()
        or _modes()
        or _tracing_state() is not None
        or _transform() is not None
        or _forward_ad._current_level >= 0
    ):
        return False
    # Not `all`, whose generator takes as long as the rest. The memory of `z.conj().imag` has
    # numbers of the other sign.
    for x in tensors:
        if x is not None and (
            type(x) not in _ORDINARY or x.is_meta or x.is_neg() or _is_batched(x)
        ):
            return False
    return True


def direct(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether kernels can be launched on these without the dispatcher."""
    return x.is_cuda and ordinary(x, *others)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def require_frozen(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises NotImplementedError if one of these weights is to have a gradient from `op`."""
    if needs_gradient(*tensors):
        raise NotImplementedError(
            f"{op} has no gradients of its weights and biases. Freeze them, or use PyTorch's own."
        )


def differentiable_by(op: str, differentiable: Callable, in_kernel: Callable) -> None:
    """Make `differentiable` what the dispatcher calls where a gradient may be wanted.

    It asks for that under `no_grad` as well, and in the inference graphs of compilers: there the
    way by autograd's function and back to the dispatcher would take longer than the kernel, and
    keep what only a backward pass reads.
    """

    def run(*arguments):
        # A forward derivative is refused by autograd's function.
        if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
            return differentiable(*arguments)
        if direct(*[x for x in arguments if isinstance(x, torch.Tensor)]):
            return in_kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fbila, op)(*arguments)

    LIBRARY.impl(op, run, "Autograd")


def linear_attn(q, k, v, key_weight, *options):
    """`fbila::linear_attn`, straight away where nothing stands in between."""
    if not ordinary(q, k, v, key_weight):
        return torch.ops.fbila.linear_attn(q, k, v, key_weight, *options)
    return linear_attn_directly(q, k, v, key_weight, *options)


def linear_attn_directly(q, k, v, key_weight, *options):
    """`linear_attn` of `ordinary` tensors."""
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (key_weight is not None and key_weight.requires_grad)
    ):
        return LinearAttn.apply(q, k, v, key_weight, *options)
    return library.inference(q, k, v, key_weight, *options)


class LinearAttn(torch.autograd.Function):
    """`fbila::linear_attn` and its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, key_weight, key_mask, count, table, cu_seqlens, *options):
        ctx.options, ctx.places = options, None
        inputs = (q, k, v, key_weight, key_mask, count, table, cu_seqlens)
        if ordinary(q, k, v):
            ctx.places = places(q, k, v)
            o, state, inverse = library.forward(*inputs, *options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, state, inverse = torch.ops.fbila.linear_attn_forward(*inputs, *options)
        ctx.save_for_backward(*inputs, state, inverse)
        return o

    @staticmethod
    def backward(ctx, do):
        inputs = ctx.saved_tensors
        need_q, need_k, need_v, need_w = ctx.needs_input_grad[:4]
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        direct = not torch.is_grad_enabled() and ordinary(do, *inputs[:3])
        need_keys = need_k or need_v or need_w
        arguments = (do, *inputs, *ctx.options, [need_q, need_keys])
        if direct and need_keys and ctx.places:
            dq, dk, dv = gradients_in(ctx.places, *inputs[:3])
            (dw,) = library.backward_into(*arguments, dq, dk, dv)
        else:
            run = library.backward if direct else torch.ops.fbila.linear_attn_backward
            dq, dk, dv, dw = run(*arguments)
        return (
            dq if need_q else None,
            dk if need_k else None,
            dv if need_v else None,
            dw if need_w else None,
            *[None] * (4 + len(ctx.options)),
        )


def refuse_second_derivative(
    op: str, names: str, instead: str = "Pass impl='reference' for gradients of gradients."
) -> None:
    """Make the backward pass `op` say that it has no gradient, rather than give a zero one."""

    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.fbila, op)(*arguments)

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(
                f"{names} cannot be differentiated twice by their kernels. {instead}"
            )

    def run(*arguments):
        # The dispatcher calls this in the backward passes of compilers as well.
        if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
            return Refusal.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fbila, op).default(*arguments)

    LIBRARY.impl(op, run, "Autograd")


differentiable_by("linear_attn", LinearAttn.apply, library.inference)
inline("linear_attn", library.inference)
inline("linear_attn_forward", library.forward)
inline("linear_attn_backward", library.backward)
refuse_second_derivative("linear_attn_backward", "linear_attn and simple_la")

"""Calls like one before: their checks have passed, and how to launch them is known.

The checks take a third of the host's time for a small input, and most of the rest is spent on
finding out anew what to launch. Both depend on the options and on everything about the tensors but
their values, which is remembered.
"""

from typing import TYPE_CHECKING, Any

import torch

from . import library
from .autograd import ordinary
from .places import gradients_in, places

if TYPE_CHECKING:
    from .kernels.backward import Backward
    from .kernels.forward import Forward, ShortForward

# More kinds of calls than any model makes; a program that makes more pays for the checks.
MOST = 4096
_PASSED: dict[Any, "Known"] = {}
# The tensors of the options.
ABSENT = (None,) * 5


class Known:
    """A kind of call without options: `linear_attn` on tensors like those seen before."""

    def __init__(self, feature_map: str, normalizer: str, scale: float, eps: float) -> None:
        self.options = (feature_map, normalizer, "none", scale, eps)
        self.planned: Forward | ShortForward | None = None
        # By the strides of do.
        self.backwards: dict[tuple[int, ...], Backward | None] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return KnownLinearAttn.apply(q, k, v, self)
        planned = None if self.planned is None else self.planned(q, k, v, False)
        if planned is not None:
            return planned[0]
        o = library.inference(q, k, v, *ABSENT, *self.options)
        self._plan_forward(q, k, v, o)
        return o

    def forward(self, q, k, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `library.forward`."""
        planned = None if self.planned is None else self.planned(q, k, v, True)
        if planned is not None:
            return planned
        results = library.forward(q, k, v, *ABSENT, *self.options)
        self._plan_forward(q, k, v, results[0])
        return results

    def backward(self, do, q, k, v, state, inverse) -> tuple[torch.Tensor, ...]:
        """As `library.backward`, for all three gradients."""
        planned = self.backwards.get(do.stride())
        if planned is not None:
            gradients = planned(do, q, k, v, state, inverse)
            if gradients is not None:
                return gradients
        *gradients, _ = library.backward(
            do, q, k, v, *ABSENT, state, inverse, *self.options, [True, True]
        )
        if do.is_cuda and do.numel() and k.shape[2] and do.stride() not in self.backwards:
            self._plan_backward(do, q, k, v, gradients)
        return tuple(gradients)

    def backward_in(self, found, do, q, k, v, state, inverse) -> list[torch.Tensor]:
        """`backward`, which writes the gradients of parts where they belong."""
        gradients = gradients_in(found, q, k, v)
        library.backward_into(
            do, q, k, v, *ABSENT, state, inverse, *self.options, [True, True], *gradients
        )
        return gradients

    def _plan_forward(self, q, k, v, o) -> None:
        from .kernels.forward import Forward, ShortForward
        from .kernels.short import serves

        if self.planned is not None or not (q.is_cuda and o.numel() and k.shape[2]):
            return
        feature_map, normalizer, _, scale, eps = self.options
        factor, eps = library.scalars(normalizer, scale, eps, k.shape[2])
        plan = ShortForward if serves(q, k, v, feature_map) else Forward
        self.planned = plan(q, k, v, o, feature_map, normalizer, factor, eps)

    def _plan_backward(self, do, q, k, v, gradients) -> None:
        from .kernels.backward import Backward

        feature_map, normalizer, _, scale, eps = self.options
        factor, _ = library.scalars(normalizer, scale, eps, k.shape[2])
        self.backwards[do.stride()] = (
            Backward(do, q, k, v, gradients, feature_map, normalizer != "none", factor)
            if Backward.serves(q, v, feature_map)
            else None
        )


class KnownLinearAttn(torch.autograd.Function):
    """`autograd.LinearAttn` of a `Known` kind of call."""

    @staticmethod
    def forward(ctx, q, k, v, known):
        o, state, inverse = known.forward(q, k, v)
        ctx.save_for_backward(q, k, v, state, inverse)
        ctx.known, ctx.places = known, places(q, k, v)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, state, inverse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        direct = not torch.is_grad_enabled() and ordinary(do, q, k, v)
        if all(needs) and direct and ctx.places:
            return (*ctx.known.backward_in(ctx.places, do, q, k, v, state, inverse), None)
        if all(needs) and direct:
            return (*ctx.known.backward(do, q, k, v, state, inverse), None)
        run = library.backward if direct else torch.ops.fbila.linear_attn_backward
        gradients = run(
            do, q, k, v, *ABSENT, state, inverse, *ctx.known.options,
            [needs[0], needs[1] or needs[2]],
        )  # fmt: skip
        return (*(x if needed else None for x, needed in zip(gradients, needs, strict=False)), None)


def signature(q: Any, k: Any, v: Any, *options: Any) -> tuple | None:
    """What a kind of call is told by; None where calls are not to be told apart by that."""
    if q is None or k is None or v is None or not ordinary(q, k, v):
        return None
    if q.is_nested or k.is_nested or v.is_nested:
        return None
    # What is not strided has no strides to ask for.
    if not q.layout == k.layout == v.layout == torch.strided:
        return None
    # Inside autocast only what it would leave as it is.
    if torch._C._is_any_autocast_enabled():
        dtype = torch.get_autocast_dtype(q.device.type)
        if not q.dtype == k.dtype == v.dtype == dtype:
            return None
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, *options,
    )  # fmt: skip


def recall(call: tuple | None) -> Known | None:
    return None if call is None else _PASSED.get(call)


def known_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    normalizer: str,
    eps: float,
) -> Known:
    """The passes of `linear_attn` on such tensors, for a caller who knows that they are right."""
    call = signature(q, k, v, feature_map, normalizer, eps, "triton")
    known = recall(call)
    if known is None:
        known = Known(feature_map, normalizer, 1.0, eps)
        remember(call, known)
    return known


def remember(call: tuple | None, known: Known) -> None:
    if call is not None and len(_PASSED) < MOST:
        _PASSED[call] = known

"""The parts of a projection, queries and keys of them rotated, by a kernel either way.

In PyTorch's operations two of the parts are copied in float32, turned as complex numbers and cast
back, and the gradients as well before all four are put together. Here parts and gradients are read
where they lie, and written once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import direct, needs_gradient, ordinary
from .derived import derived
from .replay import replayed
from .rotary import Rotary, rotate

# What the tables are made in.
_TABLES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def rotated_parts(whole: Tensor, rotary: Rotary) -> Sequence[Tensor]:
    """q, k, v and g `(B, N, H, d)` of `(B, N, 4, H, d)`; q and k contiguous, v and g views of it.

    By kernels in eager mode on a GPU, PyTorch elsewhere. q and k are rotated in the dtype of the
    tables `(N, d / 2)`, float32 at least. Gradients of gradients are PyTorch's.
    """
    cos, sin, interleaved = rotary
    # What traces modules has no tensors here.
    known = interleaved and isinstance(whole, Tensor) and direct(whole, cos, sin)
    if known and _fit(whole, cos, sin):
        if not needs_gradient(whole):
            return *in_kernel(whole, cos, sin), whole.select(2, 2), whole.select(2, 3)
        # Tables of inference mode cannot be kept for a backward pass.
        if not (cos.is_inference() or sin.is_inference()):
            return _RotatedParts.apply(whole, cos, sin)
    pair, v, gate = whole.split((2, 1, 1), 2)
    # Contiguous, as the output is to be.
    q, k = _by_pytorch(pair.movedim(2, 0), rotary)
    return q, k, v.squeeze(2), gate.squeeze(2)


def _fit(whole: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the tables are plain ones for all heads, and all of it is at one place."""
    _, N, _, _, d = whole.shape
    return (
        cos.shape == sin.shape == (N, d / 2)
        and cos.dtype is sin.dtype is _TABLES.get(whole.dtype)
        and whole.is_contiguous()
        and whole.numel() > 0
        and whole.get_device() == cos.get_device() == sin.get_device()
        and not needs_gradient(cos, sin)
    )


def _by_pytorch(x: Tensor, rotary: Rotary) -> Sequence[Tensor]:
    """Both of x `(2, B, N, H, d)`, rotated."""
    cos, sin, interleaved = rotary
    wide = x.to(cos.dtype, memory_format=torch.contiguous_format).contiguous()
    if not (interleaved and ordinary(wide, cos, sin)):
        # Compilers do better without complex numbers.
        tables = Rotary(cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
        return rotate(wide, tables).to(x.dtype).unbind()
    turns = derived(lambda: torch.complex(cos, sin).unsqueeze(1), "complex", cos, sin)
    _, B, N, heads, d = x.shape
    pairs = torch.view_as_complex(wide.view(2, B, N, heads, d // 2, 2)) * turns
    return torch.view_as_real(pairs).view(x.shape).to(x.dtype).unbind()


class _RotatedParts(torch.autograd.Function):
    """Keeps the tables alone. v and g are views, which autograd lets nobody change in place."""

    @staticmethod
    def forward(ctx, whole, cos, sin):
        ctx.save_for_backward(cos, sin)
        return *in_kernel(whole, cos, sin), whole.select(2, 2), whole.select(2, 3)

    @staticmethod
    def backward(ctx, *gradients):
        # With gradients enabled, gradients of gradients are wanted.
        unseen = not torch.is_grad_enabled() and ordinary(*gradients)
        run = backward_in_kernel if unseen else backward_by_pytorch
        return run(*gradients, *ctx.saved_tensors), None, None


@replayed
def in_kernel(whole, cos, sin):
    """q and k of a contiguous whole, which has elements."""
    from .kernels.rotated_parts import plan_rotated_parts

    B, N, _, heads, d = whole.shape
    q, k = (whole.new_empty(B, N, heads, d) for _ in range(2))
    run = plan_rotated_parts(B, N, heads, d, whole.dtype, False)
    run(whole, cos.contiguous(), sin.contiguous(), q, k)
    return q, k


@replayed
def backward_in_kernel(dq, dk, dv, dgate, cos, sin):
    from .kernels.rotated_parts import plan_rotated_parts

    B, N, heads, d = dq.shape
    dwhole = dq.new_empty(B, N, 4, heads, d)
    parts = [part.contiguous() for part in (dq, dk, dv, dgate)]
    run = plan_rotated_parts(B, N, heads, d, dq.dtype, True)
    run(dwhole, cos.contiguous(), sin.contiguous(), *parts)
    return dwhole


def backward_by_pytorch(dq, dk, dv, dgate, cos, sin):
    """The same, by operations that can be differentiated."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pair = torch.stack((dq, dk)).to(cos.dtype)
    # Slices, which many gradients at once have as well.
    a, b = pair[..., ::2], pair[..., 1::2]
    pair = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).reshape(pair.shape)
    return torch.stack((*pair.to(dq.dtype).unbind(), dv, dgate), 2)

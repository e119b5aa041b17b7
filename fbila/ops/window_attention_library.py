"""Softmax attention within windows of a grid as a torch.library op.

    o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + bias_ij + mask_ij) v_j        i, j of one window

`fbila::window_attention`: qkv `(B, H, W, 3 C)` of any H and W, table
`((2 rows - 1) (2 columns - 1), heads)`, whose number for a query and a key depends on how far apart
they are, fill `(3 C,)` or None, window `(rows, columns)` and shift -> `(B, H, W, C)`. Windows begin
at the shift, and the mask is -100 for tokens that only the shift has brought together. What lies
beyond the grid in the last windows has the queries, keys and values of fill, or zeros: a linear
map's bias is what it makes of zeros.
Liu et al., "Swin Transformer", ICCV 2021, https://arxiv.org/abs/2103.14030.

The grid is read and written in place; the logits are nowhere in memory, and for the gradients the
inputs are kept, and nothing else. Kernels on CUDA for windows of 64 tokens and heads of 64 channels
at most, but not of float64; `windows.py` elsewhere.
"""

import torch
from torch import Tensor

from .autocast import without_autocast
from .autograd import differentiable_by, direct, needs_gradient, refuse_second_derivative
from .inlining import inline
from .library import LIBRARY, sum_dtype
from .memory_format import dtypes_of
from .replay import replayed
from .windows import Size, from_windows, join_heads, pair_numbers, split_heads, to_windows, weights
from .windows import window_attention as by_pytorch

# Of a tile.
TOKENS, CHANNELS = 64, 64

_ARGUMENTS = "Tensor qkv, Tensor table, Tensor? fill, int[2] window, int[2] shift"
LIBRARY.define(f"window_attention({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"window_attention_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")


def empty_result(qkv, table, fill, window, shift):
    """y, uninitialised.

    Raises:
        ValueError: For what the kernel would read wrongly.
    """
    numbers = (2 * window[0] - 1) * (2 * window[1] - 1)
    if qkv.ndim != 4 or table.ndim != 2 or qkv.shape[3] % (3 * max(1, table.shape[1])):
        raise ValueError(
            "qkv must be (B, H, W, 3 C) and table (numbers, heads), with heads that divide C, got "
            f"{list(qkv.shape)} and {list(table.shape)}."
        )
    if min(window) < 1 or min(shift) < 0 or table.shape[0] != numbers:
        raise ValueError(
            f"table must have {numbers} rows for windows of {list(window)}, and no shift be "
            f"negative, got {table.shape[0]} rows and a shift of {list(shift)}."
        )
    if fill is not None and fill.shape != qkv.shape[3:]:
        raise ValueError(f"fill must be ({qkv.shape[3]},), got {list(fill.shape)}.")
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def served(qkv: Tensor, table: Tensor, window: Size) -> bool:
    """Whether there are kernels for it."""
    fits = window[0] * window[1] <= TOKENS and qkv.shape[3] // (3 * table.shape[1]) <= CHANNELS
    return fits and qkv.dtype != torch.float64


@replayed
def in_kernel(qkv, table, fill, window, shift):
    from .kernels.window_attention import plan_window_attention

    if not qkv.numel() or not served(qkv, table, window):
        return in_pytorch(qkv, table, fill, window, shift)
    y = empty_result(qkv, table, fill, window, shift)
    qkv, table = qkv.contiguous(), table.contiguous()
    fill = None if fill is None else fill.contiguous()
    options = table.shape[1], tuple(window), tuple(shift), dtypes_of(qkv, table, fill, y)
    plan_window_attention(y.shape, *options)(qkv, table, fill, y)
    return y


def in_pytorch(qkv, table, fill, window, shift):
    y = empty_result(qkv, table, fill, window, shift)
    return y.copy_(formula(qkv, table, fill, window, shift)) if y.numel() else y


def formula(qkv, table, fill, window, shift):
    wide = sum_dtype(qkv)
    with without_autocast(qkv):
        return by_pytorch(qkv.to(wide), table.to(wide), fill, window, shift)


def empty_gradients(dy, qkv, table, fill, window, shift):
    dfill = qkv.new_empty(0) if fill is None else fill.new_empty(fill.shape)
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape), dfill


def backward_in_kernel(dy, qkv, table, fill, window, shift):
    if not qkv.numel() or not served(qkv, table, window):
        return backward_in_pytorch(dy, qkv, table, fill, window, shift)
    C = dy.shape[3]
    dqkv, dtable, beyond = backward_launched(dy, qkv, table, fill, window, shift)
    if fill is None:
        return dqkv, dtable, beyond
    dfill = fill.new_zeros(3 * C)
    if beyond.numel():
        # Queries beyond the grid have no result.
        dfill[C:].copy_(beyond.sum(0))
    return dqkv, dtable, dfill


@replayed
def backward_launched(dy, qkv, table, fill, window, shift):
    """The gradients of qkv and table, and the sums of keys and values beyond the grid."""
    from .kernels.window_attention_backward import plan_grad_window_attention

    heads = table.shape[1]
    dqkv, dtable = qkv.new_empty(qkv.shape), table.new_empty(table.shape)
    qkv, table, dy = qkv.contiguous(), table.contiguous(), dy.contiguous()
    fill = None if fill is None else fill.contiguous()
    kinds = dtypes_of(qkv, table, fill, dy, dtable)
    launch, add_up, groups = plan_grad_window_attention(
        dy.shape, heads, tuple(window), tuple(shift), kinds
    )
    T, C = window[0] * window[1], dy.shape[3]
    sums = table.new_empty((groups, heads, T, T), dtype=torch.float32)
    if launch.constants["FILLED"]:
        beyond = sums.new_empty((groups, 2 * C))
        launch(qkv, table, fill, dy, dqkv, sums, beyond)
    else:
        beyond = qkv.new_empty(0)
        launch(qkv, table, fill, dy, dqkv, sums, None)
    add_up(sums, dtable)
    return dqkv, dtable, beyond


def backward_in_pytorch(dy, qkv, table, fill, window, shift):
    gradients = empty_gradients(dy, qkv, table, fill, window, shift)
    if not qkv.numel():
        return tuple([t.zero_() for t in gradients])
    wide, heads, size = sum_dtype(qkv), table.shape[1], qkv.shape[1:3]
    with without_autocast(qkv):
        parts = to_windows(qkv.to(wide), window, shift, fill).chunk(3, -1)
        q, k, v = (split_heads(part, heads) for part in parts)
        do = split_heads(to_windows(dy.to(wide), window, shift), heads)
        p = weights(q, k, table.to(wide), window, shift)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        scale = q.shape[-1] ** -0.5
        found = torch.cat(
            [join_heads(t) for t in (ds @ k * scale, ds.mT @ q * scale, p.mT @ do)], -1
        )
        dqkv, dtable, dfill = gradients
        dqkv.copy_(from_windows(found, window, shift, size))
        pairs = pair_numbers(window, qkv.device).flatten()
        of_pairs = ds.sum((0, 1, 2)).flatten(1).t()
        dtable.copy_(of_pairs.new_zeros(table.shape).index_add(0, pairs, of_pairs))
        if fill is not None:
            beyond = 1 - to_windows(found.new_ones(1, *size, 1), window, shift)
            dfill.copy_((found * beyond).sum((0, 1, 2, 3)))
    return gradients


class WindowAttention(torch.autograd.Function):
    """`fbila::window_attention` and its gradients."""

    @staticmethod
    def forward(ctx, qkv, table, fill, window, shift):
        ctx.save_for_backward(qkv, table, fill)
        ctx.sizes = window, shift
        if direct(qkv, table, fill):
            return in_kernel(qkv, table, fill, window, shift)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fbila.window_attention(qkv, table, fill, window, shift)

    @staticmethod
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted, which the op refuses.
        unseen = not torch.is_grad_enabled() and direct(dy, *tensors)
        run = backward_in_kernel if unseen else torch.ops.fbila.window_attention_backward
        gradients = run(dy, *tensors, *ctx.sizes)
        wanted = ctx.needs_input_grad[:3]
        return (
            *[t if want else None for t, want in zip(gradients, wanted, strict=True)],
            None,
            None,
        )


LIBRARY.impl("window_attention", in_kernel, "CUDA")
LIBRARY.impl("window_attention", in_pytorch, "CPU")
differentiable_by("window_attention", WindowAttention.apply, in_kernel)
torch.library.register_fake("fbila::window_attention", empty_result, lib=LIBRARY)
inline("window_attention", in_kernel)
LIBRARY.impl("window_attention_backward", backward_in_kernel, "CUDA")
LIBRARY.impl("window_attention_backward", backward_in_pytorch, "CPU")
torch.library.register_fake("fbila::window_attention_backward", empty_gradients, lib=LIBRARY)
inline("window_attention_backward", backward_in_kernel)
refuse_second_derivative("window_attention_backward", "window_attention", "Use PyTorch's for that.")


def window_attention(
    qkv: Tensor,
    table: Tensor,
    fill: Tensor | None,
    window: Size,
    shift: Size,
    drop: float = 0.0,
) -> Tensor:
    """`fbila::window_attention` on a GPU, straight away where nothing stands in between.

    drop: The probability of dropout of the weights, for which there are no kernels.
    """
    if drop or not qkv.is_cuda or not served(qkv, table, window):
        return by_pytorch(qkv, table, fill, window, shift, drop)
    if not direct(qkv, table, fill):
        return torch.ops.fbila.window_attention(qkv, table, fill, window, shift)
    run = WindowAttention.apply if needs_gradient(qkv, table, fill) else in_kernel
    return run(qkv, table, fill, window, shift)

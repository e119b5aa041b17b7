"""A linear map, after GELU or not, whose training keeps less and sums biases' gradients faster.

    y = f(x) W^T + b        f: identity or GELU

PyTorch keeps x and GELU(x) for the gradients; here GELU is computed again, by the kernel that
multiplies by its slope. The gradient of b, a sum over all tokens, is a kernel's as well. Matrix
products are PyTorch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import cast_for_autocast, without_autocast
from .autograd import direct, needs_gradient, ordinary
from .casts import cast_of
from .library import sum_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of x or y, the larger, from which kernels save more than Python's part of them takes; and
# those of y with as many rows as these, over which PyTorch's sums take several times as long.
FEWEST = 2**25
MANY, FEWEST_OF_MANY = 2**17, 2**23


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`F.linear` of x `(..., I)`, or of its GELU.

    By kernels where gradients of `FEWEST` elements or more, or of a bias over `MANY` rows, are
    wanted on a GPU, PyTorch elsewhere. Under autocast all of it is of the lower precision if x is,
    as PyTorch's own. Gradients of gradients are PyTorch's.
    """
    weight, bias = cast_of(x, weight), cast_of(x, bias)
    if needs_gradient(x, weight, bias) and direct(x, weight, bias) and _is_large(x, weight, bias):
        narrow = cast_for_autocast(x, weight, *([] if bias is None else [bias]))
        # Of float32 GELU is computed in float32, and cast then.
        served = narrow[0].dtype == x.dtype or not gelu
        one = {t.dtype for t in narrow}
        if served and len(one) == 1 and x.dtype in _DTYPES and x.dim() > 1:
            return _Linear.apply(*narrow, *([None] if bias is None else []), gelu)
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


def _is_large(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    O, I = weight.shape
    if min(I, O) == 0:
        return False
    rows = x.numel() // I
    if rows * max(I, O) >= FEWEST:
        return True
    return bias is not None and rows >= MANY and rows * O >= FEWEST_OF_MANY


class _Linear(torch.autograd.Function):
    """Keeps x and weight alone, and of these what the wanted gradients read."""

    @staticmethod
    def forward(ctx, x, weight, bias, gelu):
        need_x, need_w, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            x if need_w or (need_x and gelu) else None, weight if need_x else None
        )
        ctx.gelu = gelu
        rows = (F.gelu(x) if gelu else x).reshape(-1, x.shape[-1])
        # Not a view, as F.linear's is: what a function returns as one may not be changed in place.
        y = x.new_empty(*x.shape[:-1], len(weight))
        if bias is None:
            torch.mm(rows, weight.t(), out=y.view(-1, len(weight)))
        else:
            torch.addmm(bias, rows, weight.t(), out=y.view(-1, len(weight)))
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # With gradients enabled, gradients of gradients are wanted.
        unseen = not torch.is_grad_enabled() and ordinary(dy, x, weight)
        differentiate = by_kernels if unseen else by_pytorch
        # The products are of the dtypes of the forward pass, as kernels take them.
        with without_autocast(dy):
            found = differentiate(dy, x, weight, ctx.gelu, ctx.needs_input_grad[:3])
        return *found, None


def by_kernels(dy, x, weight, gelu, needs_grad):
    """dx, dweight and dbias, or None for what is not needed.

    x or weight is None where none of them reads it.
    """
    need_x, need_w, need_b = needs_grad
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dw = db = None
    if x is not None:
        x = x.reshape(-1, x.shape[-1])
    if need_x:
        dx = rows @ weight
    if gelu and need_x:
        dx, x = gelu_backward(x, dx)
    elif gelu and need_w:
        x = F.gelu(x)
    if need_w:
        dw = rows.mT @ x
    if need_b:
        db = column_sums(rows)
    return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), dw, db


def by_pytorch(dy, x, weight, gelu, needs_grad):
    """The same, by operations that can be differentiated."""
    need_x, need_w, need_b = needs_grad
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dw = db = None
    if need_x:
        dx = dy @ weight
        dx = torch.ops.aten.gelu_backward(dx, x) if gelu else dx
    if need_w:
        f = F.gelu(x) if gelu else x
        dw = rows.t() @ f.reshape(-1, f.shape[-1])
    if need_b:
        db = rows.sum(0)
    return dx, dw, db


def gelu_backward(x: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by x, in place of df, and GELU(x); both are contiguous and not empty."""
    from .kernels.gelu_backward import plan_gelu_backward

    x, f = x.contiguous(), torch.empty_like(df)
    plan_gelu_backward(x.numel(), x.dtype)(x, df, df, f)
    return df, f


def column_sums(x: Tensor) -> Tensor:
    """The sum over the rows of x `(R, C)`, which has some."""
    from .kernels.column_sums import plan_column_sums

    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    R, C = x.shape
    launch, add_up, parts = plan_column_sums(R, C, x.stride(0) if R > 1 else C, x.dtype)
    total = x.new_empty(C)
    if parts == 1:
        launch(x, total)
        return total
    sums = x.new_empty(parts, C, dtype=sum_dtype(x))
    launch(x, sums)
    add_up(sums, None, total)
    return total

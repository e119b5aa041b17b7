"""LinFusion's layer as one differentiable operation, for training on a GPU.

Autograd would go through seven linear maps, each with casts of its weights under autocast, and
keep what each of them read. Here the weights are cast once, together; maps of queries and keys are
one product each; and what is kept are the input, W_1 x, x + F(x), q, k, v and o, in the dtype of
the computation. h = LeakyReLU(LayerNorm(W_1 x + b_1)) is computed again.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as unflatten

from ..ops.autograd import ordinary
from ..ops.repeated import known_call
from ..ops.tensor_checks import MAX_HEAD_DIM
from .nonlinear_projection import NonlinearProjection, untouched


class Weights(NamedTuple):
    """Views of one flat tensor, for C channels and M between the two maps of F.

    Queries come first, keys second. Gradients have the same form.
    """

    first: Tensor  # W_1 (2, M, C)
    first_bias: Tensor  # (2, M)
    second: Tensor  # W_2 (2, C, M)
    second_bias: Tensor  # (2, C)
    project: Tensor  # W_q and W_k (2, C, C)
    value: Tensor  # W_v (C, C)
    out: Tensor  # W_o (C, C)
    out_bias: Tensor  # (C,)


@lru_cache(maxsize=64)
def templates(dim: int, mid: int) -> tuple[int, Weights, list[Tensor]]:
    """Numbers in all; tensors shaped as `Weights`; and as the first of `parameters_of`."""
    shapes = (
        (2, mid, dim), (2, mid), (2, dim, mid), (2, dim), (2, dim, dim), (dim, dim),
        (dim, dim), (dim,),
    )  # fmt: skip
    weights = Weights(*(torch.empty(shape, device="meta") for shape in shapes))
    parts = [*(x for pair in weights[:5] for x in pair.unbind()), *weights[5:]]
    return sum(x.numel() for x in weights), weights, parts


def parameters_of(layer: Any) -> list[Tensor]:
    """The weights of the linear maps in the order of `Weights`, then those of the two norms."""
    get = layer._modules
    f_q, f_k = get["to_q_"]._modules, get["to_k_"]._modules
    pairs = [(f_q[i]._parameters, f_k[i]._parameters) for i in ("0", "3", "1")]
    (first, second, norm) = (
        [f[name] for name in ("weight", "bias") for f in pair] for pair in pairs
    )
    out = get["to_out"]._modules["0"]._parameters
    rest = [get[name]._parameters["weight"] for name in ("to_q", "to_k", "to_v")]
    return [*first, *second, *rest, out["weight"], out["bias"], *norm]


def serves(layer: Any, x: Tensor) -> bool:
    """Whether the layer can be computed as one operation on x, and is to be trained."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.is_cuda):
        return False
    modules = layer._modules
    out, dropout = modules["to_out"]._modules.values()
    nonlinear = modules["to_q_"], modules["to_k_"]
    if any(type(f) is not NonlinearProjection for f in nonlinear):
        return False
    inner = [m for f in nonlinear for m in f._modules.values()]
    linears = (modules["to_q"], modules["to_k"], modules["to_v"], out)
    if not all(map(untouched, (*nonlinear, *inner, *linears, dropout))):
        return False
    parameters = parameters_of(layer)
    dtype = parameters[0].dtype
    return (
        parameters[8].requires_grad
        and ordinary(x, *parameters)
        and all(p.dtype == dtype and p.device == x.device for p in parameters)
        and (x.dtype == dtype or torch.is_autocast_enabled("cuda"))
        and not (dropout.training and dropout.p)
        and layer.to_v.in_features <= MAX_HEAD_DIM * layer.heads
        and x.numel() > 0
    )


def attend(layer: Any, x: Tensor, eps: float) -> Tensor:
    """The layer's answer to x `(B, N, C)`, in the dtype of x."""
    norm, activation = layer.to_q_[1], layer.to_q_[2]
    scalars = layer.heads, eps, norm.eps, activation.negative_slope
    return LinFusionLayer.apply(x, scalars, *parameters_of(layer))


class LinFusionLayer(torch.autograd.Function):
    """`GeneralizedLinearAttention` and its gradient."""

    @staticmethod
    def forward(ctx, x, scalars, *parameters):
        from ..ops.kernels.norm import launch_norm

        heads, eps, norm_eps, slope = scalars
        B, N, C = x.shape
        mid = parameters[0].shape[0]
        size, weights, parts = templates(C, mid)
        rows = x.reshape(B * N, C)
        flat = x.new_empty(size)
        torch._foreach_copy_(unflatten(flat, parts), parameters[:13])
        w = Weights(*unflatten(flat, weights))
        norms = torch.stack(parameters[13:]).view(2, 2, mid).unbind()
        y = F.linear(rows, w.first.view(2 * mid, C), w.first_bias.view(2 * mid))
        y = y.as_strided((2, B * N, mid), (mid, 2 * mid, 1))
        h = launch_norm(y, *norms, norm_eps, slope)
        s = rows + w.second_bias.unsqueeze(1)
        s.baddbmm_(h, w.second.mT)
        qk = torch.bmm(s, w.project.mT)
        v = F.linear(rows, w.value)
        heads_first = (B, heads, N, C // heads), (N * C, C // heads, C, 1)
        q, k = (qk.as_strided(*heads_first, i * rows.numel()) for i in range(2))
        v = v.as_strided(*heads_first)
        known = known_call(q, k, v, "elu1", "mean", eps)
        o, state, inverse = known.forward(q, k, v)
        o = _rows(o, rows)
        out = F.linear(o, w.out, w.out_bias)
        ctx.save_for_backward(rows, y, s, q, k, v, o, state, inverse, flat, *norms)
        ctx.known, ctx.scalars, ctx.dtype = known, scalars, parameters[0].dtype
        return out.view(B, N, C)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "LinFusion's layer cannot be differentiated twice: its kernels have no gradients "
                "of gradients."
            )
        from ..ops.kernels.norm import launch_norm
        from ..ops.kernels.norm_backward import launch_grad_norm

        rows, y, s, q, k, v, o, state, inverse, flat, *norms = ctx.saved_tensors
        _, _, norm_eps, slope = ctx.scalars
        _, weights, parts = templates(rows.shape[1], y.shape[2])
        w = Weights(*unflatten(flat, weights))
        dflat = torch.empty_like(flat)
        d = Weights(*unflatten(dflat, weights))
        shape, g = g.shape, g.reshape(rows.shape)
        torch.mm(g.t(), o, out=d.out)
        torch.sum(g, 0, out=d.out_bias)
        do = torch.mm(g, w.out).as_strided(q.shape, v.stride())
        *dqk, dv = (_rows(x, rows) for x in ctx.known.backward(do, q, k, v, state, inverse))
        ds = torch.empty_like(s)
        for dx, *others in zip(dqk, s, d.project, w.project, ds, strict=True):
            read, dweight, weight, dread = others
            torch.mm(dx.t(), read, out=dweight)
            torch.mm(dx, weight, out=dread)
        torch.mm(dv.t(), rows, out=d.value)
        h = launch_norm(y, *norms, norm_eps, slope)
        torch.bmm(ds.mT, h, out=d.second)
        torch.sum(ds, 1, out=d.second_bias)
        dh = torch.bmm(ds, w.second)
        dy, *dnorms = launch_grad_norm(dh, y, *norms, norm_eps, slope)
        torch.bmm(dy.mT, rows.expand_as(s), out=d.first)
        torch.sum(dy, 1, out=d.first_bias)
        dx = ds[0] + ds[1]
        dx.addmm_(dy[0], w.first[0]).addmm_(dy[1], w.first[1]).addmm_(dv, w.value)
        # One cast for all; every parameter's gradient is a part of it.
        dparameters = unflatten(dflat.to(ctx.dtype), parts)
        return dx.view(shape), None, *dparameters, *[part for t in dnorms for part in t.unbind()]


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, N, D) -> (B N, C), a view of what is token-major in memory."""
    return x.transpose(1, 2).reshape(like.shape)

"""LinFusion's layer as one differentiable operation, for training on a GPU.

Autograd would go through seven linear maps, each with casts of its weights under autocast, and
keep what each of them read. Here the weights are cast once, together; maps of queries and keys are
one product each; and what is kept are the input, W_1 x, x + F(x), q, k, v and o, in the dtype of
the computation. h = LeakyReLU(LayerNorm(W_1 x + b_1)) is computed again.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.autocast import without_autocast
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

    @classmethod
    def within(cls, flat: Tensor, dim: int, mid: int) -> "Weights":
        shapes = (
            (2, mid, dim), (2, mid), (2, dim, mid), (2, dim), (2, dim, dim), (dim, dim),
            (dim, dim), (dim,),
        )  # fmt: skip
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return cls(*(x.view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)))

    @staticmethod
    def size(dim: int, mid: int) -> int:
        return 4 * dim * (mid + dim) + 2 * mid + 3 * dim

    def parts(self) -> list[Tensor]:
        """In the order of `parameters_of`."""
        pairs = (self.first, self.first_bias, self.second, self.second_bias, self.project)
        return [*(x for pair in pairs for x in pair.unbind()), *self[5:]]


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
        rows = x.reshape(B * N, C)
        with without_autocast(x):
            flat = x.new_empty(Weights.size(C, mid))
            w = Weights.within(flat, C, mid)
            torch._foreach_copy_(w.parts(), parameters[:13])
            norms = torch.stack(parameters[13:]).view(2, 2, mid)
            y = F.linear(rows, w.first.flatten(0, 1), w.first_bias.flatten())
            h = launch_norm(_pair(y), *norms, norm_eps, slope)
            s = rows + w.second_bias[:, None]
            s.baddbmm_(h, w.second.transpose(1, 2))
            qk = torch.bmm(s, w.project.transpose(1, 2))
            v = F.linear(rows, w.value)
            attention = _heads(qk[0], heads, B), _heads(qk[1], heads, B), _heads(v, heads, B)
            known = known_call(*attention, "elu1", "mean", eps)
            o, state, inverse = known.forward(*attention)
            out = F.linear(_rows(o), w.out, w.out_bias)
        ctx.save_for_backward(rows, y, s, qk, v, o, state, inverse, flat, norms)
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

        rows, y, s, qk, v, o, state, inverse, flat, norms = ctx.saved_tensors
        heads, _, norm_eps, slope = ctx.scalars
        (B, N, C), mid = g.shape, y.shape[1] // 2
        w = Weights.within(flat, C, mid)
        dflat = torch.empty_like(flat)
        d = Weights.within(dflat, C, mid)
        with without_autocast(g):
            g = g.reshape(rows.shape)
            torch.mm(g.t(), _rows(o), out=d.out)
            torch.sum(g, 0, out=d.out_bias)
            attention = _heads(qk[0], heads, B), _heads(qk[1], heads, B), _heads(v, heads, B)
            do = _heads(g @ w.out, heads, B)
            *dqk, dv = map(_rows, ctx.known.backward(do, *attention, state, inverse))
            ds = torch.empty_like(s)
            for i in range(2):
                torch.mm(dqk[i].t(), s[i], out=d.project[i])
                torch.mm(dqk[i], w.project[i], out=ds[i])
            torch.mm(dv.t(), rows, out=d.value)
            h = launch_norm(_pair(y), *norms, norm_eps, slope)
            torch.bmm(ds.transpose(1, 2), h, out=d.second)
            torch.sum(ds, 1, out=d.second_bias)
            dh = torch.bmm(ds, w.second)
            dy, *dnorms = launch_grad_norm(dh, _pair(y), *norms, norm_eps, slope)
            torch.bmm(dy.transpose(1, 2), rows.expand_as(s), out=d.first)
            torch.sum(dy, 1, out=d.first_bias)
            dx = ds[0] + ds[1]
            dx.addmm_(dy[0], w.first[0]).addmm_(dy[1], w.first[1]).addmm_(dv, w.value)
            # One cast for all; every parameter's gradient is a part of it.
            dparameters = Weights.within(dflat.to(ctx.dtype), C, mid).parts()
        return dx.view(B, N, C), None, *dparameters, *(x for pair in dnorms for x in pair.unbind())


def _pair(y: Tensor) -> Tensor:
    """(R, 2 M) -> (2, R, M), a view."""
    return y.view(len(y), 2, -1).transpose(0, 1)


def _heads(x: Tensor, heads: int, batch: int) -> Tensor:
    """(B N, C) -> (B, H, N, D), a view."""
    return x.view(batch, -1, heads, x.shape[1] // heads).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B N, C), a view of what is token-major in memory."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)

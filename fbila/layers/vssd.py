"""VSSD's non-causal state space duality (NC-SSD): linear attention without a denominator.

    z, u, dt    = split(W_in x)
    v, k, q     = split(SiLU(dwc(u)))
    w_jh        = softplus(dt_jh + b_h) exp(A_h)
    o_ih        = q_i sum_j w_jh k_j^T v_jh + D_h v_ih
    y           = W_out (LayerNorm(o) * z)

x, y: `(B, N, C)`. dwc is a depthwise convolution over the grid. In the words of state space models
v, k, q are x, B, C: one k and one q serve all heads h. w is what one step adds to the hidden state;
that of all tokens is kept, and read by each, so that the order of tokens does not matter.
Shi et al., "VSSD: Vision Mamba with Non-Causal State Space Duality", 2024,
https://arxiv.org/abs/2407.18559; YuHengsss/VSSD.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import simple_la
from ..ops.autograd import direct
from ..ops.gated_norm_library import gated_norm
from ..ops.linear import linear
from ..ops.parts import parts
from .checks import check_heads, check_kernel_size
from .depthwise_conv import DepthwiseConv2d
from .grid import as_grid, as_tokens, grid_of, heads_of
from .layer_norm import LayerNorm
from .linear import Linear
from .plain_modules import plain

# Numbers of 16 bits in 16 bytes.
ALIGNED = 8
_WEIGHTS = (Tensor, nn.Parameter)


class NonCausalSSD(nn.Module):
    """The token mixer of VSSD, `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the official names: `in_proj`, `conv2d`, `dt_bias`, `A_log`, `D`, `norm` and
    `out_proj`. The defaults are those of VSSD-T, -S and -B; VSSD-Micro has a `d_state` of 48.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `expand * dim`.
        expand: Channels of the values, as a multiple of C.
        d_state: Channels of q and k.
        d_conv: Side of dwc; odd.
        bias: Adds biases to `in_proj` and `out_proj`.
        conv_bias: Adds one to dwc.

    Raises:
        ValueError: If `num_heads` does not divide `expand * dim`, or `d_conv` is even.

    Example:
        >>> import torch
        >>> layer = NonCausalSSD(64, num_heads=2)
        >>> layer(torch.randn(2, 7 * 5, 64), 7, 5).shape
        torch.Size([2, 35, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expand: int = 2,
        d_state: int = 64,
        d_conv: int = 3,
        bias: bool = False,
        conv_bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads(expand * dim, num_heads)
        check_kernel_size(d_conv)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.d_state = d_state
        self.d_inner = expand * dim
        mixed = self.d_inner + 2 * d_state
        self.in_proj = Linear(dim, self.d_inner + mixed + num_heads, bias=bias, **factory)
        self.conv2d = DepthwiseConv2d(mixed, d_conv, conv_bias, **factory)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **factory))
        self.A_log = nn.Parameter(torch.empty(num_heads, **factory))
        self.D = nn.Parameter(torch.ones(num_heads, **factory))
        self.norm = LayerNorm(self.d_inner, **factory)
        self.out_proj = Linear(self.d_inner, dim, bias=bias, **factory)
        self.init_steps()

    @torch.no_grad()
    def init_steps(self) -> None:
        """Steps softplus(b) between 0.001 and 0.1, evenly by their logarithm; exp(A) from 1 to 16.

        As Mamba-2 begins.
        """
        step = self.dt_bias.float().uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.A_log.copy_(self.A_log.float().uniform_(1, 16).log())

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: `(B, N, C)`, N = H * W.
            H, W: Rows and columns; without them the tokens are a square.

        Returns:
            `(B, N, C)`.

        Raises:
            ValueError: If N is not H * W.
        """
        H, W = grid_of(x.shape[1], H, W)
        z, u, dt = self.project(x)
        u = as_tokens(self.conv2d(as_grid(u, H, W), silu=True))
        sizes = self.d_inner, self.d_state, self.d_state
        v, k, q, skipped = parts(u, sizes, twice=(0,))
        v, skipped = (heads_of(t, self.num_heads) for t in (v, skipped))
        # One q and one k for all heads: a stride of 0, which the op reads in place.
        q, k = (t[:, None].expand(-1, self.num_heads, -1, -1) for t in (q, k))
        out = simple_la(q, k, v, scale=1.0, key_weight=self.weights(dt))
        return self.out_proj(self.gated(out, skipped, z))

    def gated(self, out: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """LayerNorm(out + D v) * z `(B, N, d_inner)`, for `out_proj` to read.

        By one kernel, where nothing stands in between: then only the result is rounded.
        """
        norm = self.norm
        affine = plain(norm, LayerNorm) and norm.weight is not None and norm.bias is not None
        if affine and direct(out, v, z, self.D, norm.weight, norm.bias):
            out, v = (t.transpose(1, 2).flatten(2) for t in (out, v))
            return gated_norm(out, v, z, self.D, norm.weight, norm.bias, norm.eps)
        out = torch.addcmul(out, self.D[:, None, None], v)
        return norm(out.transpose(1, 2).flatten(2)) * z

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """z, u and dt of x, views of one product, whose rows are multiples of 16 bytes.

        Those of `in_proj` itself need not be: with 2 heads they have two numbers too many for that,
        and both the product and what reads its parts fall back to narrower accesses.
        """
        sizes = (self.d_inner, self.d_inner + 2 * self.d_state, self.num_heads)
        more = -sum(sizes) % ALIGNED
        # Of weights of a kind of their own, such as quantised ones, there may be no padding.
        padded = plain(self.in_proj, Linear) and type(self.in_proj.weight) in _WEIGHTS
        if not more or not padded:
            return parts(self.in_proj(x), sizes)
        bias = self.in_proj.bias
        weight = F.pad(self.in_proj.weight, (0, 0, 0, more))
        y = linear(x, weight, None if bias is None else F.pad(bias, (0, more)))
        # Split at once: of a part of it the gradient would have to be copied.
        return parts(y, (*sizes, more))[:3]

    def weights(self, dt: Tensor) -> Tensor:
        """w `(B, heads, N)`, in float32 at least, of dt `(B, N, heads)`."""
        dtype = torch.promote_types(dt.dtype, torch.float32)
        step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        return (step * self.A_log.to(dtype).exp()).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, d_state={self.d_state}"

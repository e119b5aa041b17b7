"""InLine attention: weights that add up to one without a division, and kernels made to measure.

    a_ij = c phi(q_i) . phi(k_j) / N - mean_j(c phi(q_i) . phi(k_j) / N) + 1 / N        c = d^-1/2
    o_i  = sum_j a_ij v_j = (c / N) phi(q_i) S + mean v
    S    = sum_j phi(k_j)^T (v_j - mean v) = sum_j phi(k_j)^T v_j - (sum_j phi(k_j))^T mean v
    y    = W_proj (o + dwc(v; F(mean x)))

x, y: `(B, N, C)`. The weights of a query differ for different queries (they are injective), and may
be negative; phi is the identity in the published models. dwc is a depthwise 3 x 3 convolution over
the grid, whose kernels F makes for each picture of the mean of its tokens.
Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024,
https://arxiv.org/abs/2412.06590; LeapLabTHU/InLine.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.centred_library import centred_la
from ..ops.depthwise_conv_library import depthwise_conv
from ..ops.parts import parts
from .checks import check_attn_drop, check_heads
from .grid import grid_of, heads_of
from .linear import Linear

KERNEL_FUNCTIONS = ("identity", "relu", "leakyrelu", "exp")


class InLineAttention(nn.Module):
    """The attention layer of InLine, `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the names and shapes of the official models, InLine-DeiT, -PVT and -Swin, whose
    weights load with `strict=True`. For InLine-Swin the windows are batch items, made by the
    caller; tokens that a shift brought together are not hidden from each other, there as here.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim`.
        qkv_bias: Adds a bias to the query, key and value projections; the official models have it.
        attn_drop: Accepted for call sites written for softmax attention; must be 0, since there is
            no attention map to drop entries of. The official layer ignores it.
        proj_drop: Dropout probability after the output projection.
        sr_ratio: None: one projection `qkv` (DeiT, Swin). 1: `q` and `kv` (PVT). There are no keys
            of a reduced grid: the official layer, which has the parameters, fails on them.
        num_prefix_tokens: Tokens before those of the grid, which the convolution leaves out: 1 for
            the class token of DeiT.
        kernel_func: phi: "identity", "relu", "leakyrelu" (slope 0.01) or "exp" (of 0.2 x).

    Raises:
        ValueError: If `num_heads` does not divide `dim`; `attn_drop` is not 0; `sr_ratio` is
            neither None nor 1; `num_prefix_tokens` is negative; there is no such `kernel_func`.

    Example:
        >>> import torch
        >>> layer = InLineAttention(64, num_heads=2)
        >>> layer(torch.randn(2, 7 * 5, 64), 7, 5).shape
        torch.Size([2, 35, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        sr_ratio: int | None = None,
        num_prefix_tokens: int = 0,
        kernel_func: Literal["identity", "relu", "leakyrelu", "exp"] = "identity",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_attn_drop(attn_drop)
        if sr_ratio not in (None, 1):
            raise ValueError(
                "sr_ratio must be None or 1, since the convolution needs a value for each token; "
                f"got sr_ratio={sr_ratio}"
            )
        if num_prefix_tokens < 0:
            raise ValueError(
                f"num_prefix_tokens must not be negative, got num_prefix_tokens={num_prefix_tokens}"
            )
        if kernel_func not in KERNEL_FUNCTIONS:
            raise ValueError(f"kernel_func must be one of {KERNEL_FUNCTIONS}, got {kernel_func!r}")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.num_prefix_tokens = num_prefix_tokens
        self.kernel_func = kernel_func
        factory = {"device": device, "dtype": dtype}
        if sr_ratio is None:
            self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        else:
            self.q = Linear(dim, dim, bias=qkv_bias, **factory)
            self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **factory),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **factory),
        )

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: `(B, N, C)`, N = num_prefix_tokens + H * W.
            H, W: Rows and columns; without them the tokens after the prefix are a square.

        Returns:
            `(B, N, C)`.

        Raises:
            ValueError: If N is another number.
        """
        prefix = self.num_prefix_tokens
        H, W = grid_of(x.shape[1] - prefix, H, W)
        if self.sr_ratio is None:
            q, k, v, mixed = parts(self.qkv(x), 3, twice=(2,))
        else:
            q, (k, v, mixed) = self.q(x), parts(self.kv(x), 2, twice=(1,))
        heads = self.num_heads
        out, mean = self.attend(*(heads_of(t, heads) for t in (q, k, v)))
        first, grid = out[:, :prefix], out[:, prefix:]
        out = self.add_local(grid, x, mixed[:, prefix:], mean, H, W)
        if prefix:
            out = torch.cat((first + mean, out), 1)
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What o is beyond the mean of the values, `(B, N, C)`, and that mean, `(B, 1, C)`.

        q, k and v are `(B, heads, N, d)`. Of values about their mean no mean of weights is needed.
        """
        feature_map = None
        if self.kernel_func == "leakyrelu":
            q, k = F.leaky_relu(q), F.leaky_relu(k)
        elif self.kernel_func == "exp":
            q, k, feature_map = 0.2 * q, 0.2 * k, "exp"
        elif self.kernel_func == "relu":
            feature_map = "relu"
        scale = q.shape[-1] ** -0.5 / k.shape[-2]
        out, mean = centred_la(q, k, v, feature_map, scale)
        return out.transpose(1, 2).flatten(2), mean.flatten(1).unsqueeze(1)

    def add_local(self, out: Tensor, x: Tensor, v: Tensor, mean: Tensor, H: int, W: int) -> Tensor:
        """`out + mean + dwc(v; F(mean x))` of out and v `(B, H * W, C)` and mean `(B, 1, C)`."""
        B, _, C = v.shape
        if B == 0:
            return out  # a convolution has at least one group
        # Each picture has kernels of its own.
        kernels = self.residual(x.mean(1).unsqueeze(-1)).reshape(B * C, 1, 3, 3)
        grid, addend = (t.unflatten(1, (H, W)) for t in (v, out))
        return depthwise_conv(grid, kernels, mean.flatten(), addend).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, kernel_func={self.kernel_func!r}"
        )

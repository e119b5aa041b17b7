"""MLLA's linear attention: rotary embedding in the numerator, and a convolution of the values.

    q, k = elu(W_qk x) + 1          v = x
    o_i  = R_i q_i mean_j((R_j k_j)^T v_j) / (q_i . mean_j k_j + 1e-6)          y = o + dwc(v)

x, y: `(B, N, C)`. R turns pairs of channels by angles whose frequencies run once over all C
channels, so that every head has its own; dwc is a depthwise 3 x 3 convolution over the grid (LePE).
Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024,
https://arxiv.org/abs/2405.16605; LeapLabTHU/MLLA.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Rotary, linear_attn
from ..ops.parts import parts
from .axial_rotary import AxialRotary, axial_rotary
from .checks import check_heads
from .depthwise_conv import DepthwiseConv2d
from .grid import grid_of, heads_of
from .linear import Linear
from .over_tokens import over_tokens


class MLLALinearAttention(nn.Module):
    """The attention layer of MLLA (MILA), `(B, N, C)` to `(B, N, C)`, over a grid of any H and W.

    Parameters bear the official names, `qk` and `lepe`. Official checkpoints also hold the rotary
    tables of their training resolution, `rope.rotations`, which are no weights: they are computed
    here, for that resolution as for any other, so that the checkpoints load with `strict=True`.

    Args:
        dim: Channels C; a multiple of 4.
        num_heads: Heads; must divide `dim` into even parts.
        qkv_bias: Adds a bias to the query and key projection. Values are the input itself.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or there are no whole pairs of channels.

    Example:
        >>> import torch
        >>> layer = MLLALinearAttention(64, num_heads=2)
        >>> layer(torch.randn(2, 7 * 5, 64), 7, 5).shape
        torch.Size([2, 35, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qk = Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.lepe = DepthwiseConv2d(dim, 3, **factory)
        self.rope = MLLARotary(dim, num_heads)

    def forward(
        self,
        x: Tensor,
        H: int | None = None,
        W: int | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: `(B, N, C)`, N = H * W.
            H, W: Rows and columns; without them the tokens are a square.
            rotary: What `rope(H, W, x)` returns, to make it once for several layers.

        Returns:
            `(B, N, C)`.

        Raises:
            ValueError: If N is not H * W.
        """
        H, W = grid_of(x.shape[1], H, W)
        tables: Any = self.rope(H, W, x) if rotary is None else rotary
        own: Any = self._modules
        B, N, C = x.shape
        q, k = parts(own["qk"](x), 2)
        # All three are views, which the op reads in place.
        out = linear_attn(
            heads_of(q, self.num_heads),
            heads_of(k, self.num_heads),
            heads_of(x, self.num_heads),
            feature_map="elu1",
            eps=1e-6,
            rotary=tables,
        )
        out = out.transpose(1, 2).reshape(B, H, W, C)
        return over_tokens(own["lepe"], x.reshape(B, H, W, C), out).reshape(B, N, C)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class MLLARotary(AxialRotary):
    """The tables, which have a name in official checkpoints but are not loaded from them."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        name = prefix + "rotations"
        unexpected += [key for key in state_dict if key.startswith(prefix) and key != name]
        if name in state_dict and not self._computes(state_dict[name]):
            errors.append(
                f"{name} is not the table of rotations that {type(self).__name__}(dim={self.dim}, "
                f"base={self.base}) computes, got the shape {tuple(state_dict[name].shape)}."
            )

    def _computes(self, table: Tensor) -> bool:
        """Whether a table `(H, W, C / 2, 2)` is that of its grid, to the digits of bfloat16."""
        if table.dim() != 4 or table.shape[2:] != (self.dim // 2, 2):
            return False
        if table.is_meta:
            return True
        rows, columns = table.shape[:2]
        cos, sin, _ = axial_rotary(rows, columns, self.dim, base=self.base, device=table.device)
        ours = torch.stack((cos, sin), -1).view(table.shape)
        return torch.allclose(ours, table.float(), rtol=0, atol=1e-2)

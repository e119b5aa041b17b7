"""The block of RAVLT, and softmax attention in the place of its linear one.

    x <- x + dwc(x)          x <- x + g_1 attn(norm(x))          x <- x + g_2 ffn(norm(x))

x: `(B, H, W, C)`. dwc is a depthwise 3 x 3 convolution, and there is another one within ffn.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..layers import RALA
from ..layers.axial_rotary import AxialRotary
from ..layers.depthwise_conv import DepthwiseConv2d
from ..layers.gated_picture import GatedPictureAttention
from ..layers.layer_norm import LayerNorm
from ..layers.over_tokens import over_tokens
from ..layers.plain_modules import plain
from ..layers.pointwise_conv import PointwiseConv2d
from ..ops import Rotary
from ..ops.autograd import ordinary
from ..ops.derived import derived
from ..ops.rotary import rotate
from .stages import over_grid, with_conv

# FX cannot follow what it does with sizes.
register_notrace_module(RALA)


@register_notrace_module
class SoftmaxPictureAttention(GatedPictureAttention):
    """RALA's layer with softmax attention in it, `(B, C, H, W)` to the same shape."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        # Token-major, and so are the output, which lies as q does, and its gradient: pictures in
        # channels_last, without a copy. PyTorch 2.11 looks up the plan of cuDNN's backward pass by
        # the strides of q, k and v alone. Where the gradient lay otherwise than in the call which
        # made the plan, it would be misread: it has to lie as the output, whatever is around.
        turns = _turns(rotary, q, k)
        q, k = (_rotated(t.transpose(1, 2), rotary, turns).transpose(1, 2) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v)


def _turns(rotary: Rotary, q: Tensor, k: Tensor) -> Tensor | None:
    """The tables as complex numbers `(N, 1, d / 2)`, if channels of q and k are contiguous."""
    cos, sin, interleaved = rotary
    # Compilers do better without them.
    if not (interleaved and ordinary(q, k, cos, sin) and q.stride(-1) == k.stride(-1) == 1):
        return None
    return derived(lambda: torch.complex(cos, sin).unsqueeze(1), "complex", cos, sin)


def _rotated(x: Tensor, rotary: Rotary, turns: Tensor | None) -> Tensor:
    """x `(B, N, heads, d)` rotated in the dtype of the tables, float32 at least."""
    cos, sin, interleaved = rotary
    wide = x.to(cos.dtype)
    if turns is None:
        tables = Rotary(cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
        return rotate(wide, tables).to(x.dtype)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


@register_notrace_module
class StageRotary(AxialRotary):
    """The tables of a stage, which its blocks share; `angle` in official checkpoints."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        name = prefix + "angle"
        unexpected += [key for key in state_dict if key.startswith(prefix) and key != name]
        if name in state_dict and not self._computes(state_dict[name]):
            errors.append(
                f"{name} is not the frequencies of dim={self.dim} and base={self.base}, got the "
                f"shape {tuple(state_dict[name].shape)}."
            )

    def _computes(self, angle: Tensor) -> bool:
        """Whether they are ours, each of them twice, to the digits of bfloat16."""
        if angle.shape != (self.dim // 2,):
            return False
        if angle.is_meta:
            return True
        ours = self.base ** -torch.linspace(0, 1, self.dim // 4).repeat_interleave(2)
        return torch.allclose(ours, angle.float().cpu(), rtol=1e-2, atol=0)


class WrappedNorm(nn.Module):
    """LayerNorm of `(B, H, W, C)` for 1 x 1 convolutions, under its official name."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-6, for_maps=True, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ConvFeedForward(nn.Module):
    """`fc2(h + dwc(h))` with `h = gelu(fc1(x))`, all of them convolutions."""

    def __init__(self, dim: int, hidden: int, drop: float, **factory: Any) -> None:
        super().__init__()
        self.fc1 = PointwiseConv2d(dim, hidden, **factory)
        self.drop1 = nn.Dropout(drop)
        self.dwconv = DepthwiseConv2d(hidden, 3, **factory)
        self.fc2 = PointwiseConv2d(hidden, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = over_tokens(self.fc1, x.permute(0, 2, 3, 1))
        if self.training and self.drop1.p > 0:
            x = over_tokens(self.dwconv, self.drop1(F.gelu(x)), residual=True)
        else:
            x = over_tokens(self.dwconv, x, residual=True, gelu=True)
        return self.drop2(over_tokens(self.fc2, x).permute(0, 3, 1, 2))


class RAVLTBlock(nn.Module):
    """One block, `(B, H, W, C)` to the same shape."""

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float,
        layer_scale: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv2d(dim, 3, **factory)
        self.norm1 = WrappedNorm(dim, **factory)
        self.attn = attn
        self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **factory))
        self.norm2 = WrappedNorm(dim, **factory)
        self.ffn = ConvFeedForward(dim, int(mlp_ratio * dim), proj_drop, **factory)
        self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **factory))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = with_conv(self.pos, x)
        x = self._with(x, self.gamma_1, over_grid(self.attn, self.norm1(x), rotary))
        return self._with(x, self.gamma_2, over_grid(self.ffn, self.norm2(x)))

    def _with(self, x: Tensor, gamma: Tensor, y: Tensor) -> Tensor:
        """`x + gamma * y`, with stochastic depth."""
        drop_path = self.drop_path
        if plain(drop_path, nn.Identity) or (plain(drop_path, DropPath) and not drop_path.training):
            return torch.addcmul(x, gamma.flatten(), y)
        return x + drop_path(gamma.flatten() * y)

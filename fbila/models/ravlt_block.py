"""The block of RAVLT, and softmax attention in the place of its linear one.

    x <- x + dwc(x)          x <- x + g_1 attn(norm(x))          x <- x + g_2 ffn(norm(x))

x: `(B, H, W, C)`. dwc is a depthwise 3 x 3 convolution, and there is another one within ffn.
"""

from collections.abc import Sequence
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
from ..layers.plain_modules import idle, plain
from ..layers.pointwise_conv import PointwiseConv2d
from ..ops import Rotary
from ..ops.autograd import ordinary
from ..ops.layer_scale import add_scaled
from ..ops.rotated_parts import rotated_parts
from .casting import casting, paths
from .stages import over_grid, with_conv

# What both layers compute by, as long as nobody has put anything else in its place.
_FORWARD = GatedPictureAttention.forward

# FX cannot follow what it does with sizes.
register_notrace_module(RALA)


@register_notrace_module
class SoftmaxPictureAttention(GatedPictureAttention):
    """RALA's layer with softmax attention in it, `(B, C, H, W)` to the same shape."""

    def parts(self, whole: Tensor, rotary: Any) -> Sequence[Tensor]:
        return rotated_parts(whole, rotary)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        # Token-major, and so are the output, which lies as q does, and its gradient: pictures in
        # channels_last, without a copy. PyTorch 2.11 looks up the plan of cuDNN's backward pass by
        # the strides of q, k and v alone. Where the gradient lay otherwise than in the call which
        # made the plan, it would be misread: it has to lie as the output, whatever is around.
        return F.scaled_dot_product_attention(q, k, v)


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
        norm: Any = self._modules["norm"]
        return norm(x)


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
        """`(B, H, W, C)` to the same shape."""
        own: Any = self._modules
        x = over_tokens(own["fc1"], x)
        if self.training and self.drop1.p > 0:
            x = over_tokens(own["dwconv"], self.drop1(F.gelu(x)), residual=True)
        else:
            x = over_tokens(own["dwconv"], x, residual=True, gelu=True)
        x = over_tokens(own["fc2"], x)
        return x if idle(own["drop2"]) else self.drop2(x)


class RAVLTBlock(nn.Module):
    """One block, `(B, H, W, C)` to the same shape."""

    maps = paths("attn.qkvo", "attn.proj", "ffn.fc1", "ffn.fc2")

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

    @casting
    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        own: Any = self._modules
        x = with_conv(own["pos"], x)
        # By their names, as FX has to see that they are parameters.
        x = self._with(x, self.gamma_1, _attended(own["attn"], own["norm1"](x), rotary))
        return self._with(x, self.gamma_2, own["ffn"](own["norm2"](x)))

    def _with(self, x: Tensor, gamma: Tensor, y: Tensor) -> Tensor:
        """`x + gamma * y`, with stochastic depth."""
        drop_path: Any = self._modules["drop_path"]
        scale = gamma.view(-1)
        if idle(drop_path, DropPath):
            return add_scaled(x, scale, y)
        return x + drop_path(scale * y)


def _attended(attn: Any, x: Tensor, rotary: Rotary) -> Tensor:
    """What attention makes of tokens, without views as a picture where it is as we know it."""
    kind = type(attn)
    known = kind in (RALA, SoftmaxPictureAttention) and kind.forward is _FORWARD
    known = known and ordinary(x) and plain(attn, kind)
    return attn.of_tokens(x, rotary) if known else over_grid(attn, x, rotary)

"""The layer around RALA and MALA, which differ in how tokens are mixed.

    q, k, v, g = split(W_qkvo x)          y = W_proj ((mix(q, k, v) + dwc(v)) * g)

x, y: `(B, C, H, W)`; the projections are 1 x 1 convolutions, dwc a depthwise 5 x 5 one (LePE), and
the gate g has no activation.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import Rotary
from .axial_rotary import AxialRotary, check_pairs
from .checks import check_heads
from .depthwise_conv import DepthwiseConv2d
from .over_tokens import over_tokens
from .pointwise_conv import PointwiseConv2d


class GatedPictureAttention(nn.Module):
    """What is not the mixing: a subclass has `mix`.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide `dim` into multiples of 4.

    Raises:
        ValueError: If it does not.
    """

    takes_pictures = True

    def __init__(self, dim: int, num_heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_pairs("dim / num_heads", dim // num_heads)
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkvo = PointwiseConv2d(dim, 4 * dim, **factory)
        self.lepe = DepthwiseConv2d(dim, 5, **factory)
        self.proj = PointwiseConv2d(dim, dim, **factory)
        # A frequency's last step is the end point itself, and all heads have the same.
        self.rope = AxialRotary(dim // num_heads, endpoint=True)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Mixes the positions of a picture.

        Args:
            x: `(B, C, H, W)`, of any H and W.
            rotary: What `rope(H, W, x)` returns, to make it once for several layers.

        Returns:
            `(B, C, H, W)`.
        """
        return self.of_tokens(x.permute(0, 2, 3, 1), rotary).permute(0, 3, 1, 2)

    def of_tokens(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """`forward`, of tokens `(B, H, W, C)` to the same shape."""
        own: Any = self._modules
        B, H, W, C = x.shape
        rotary = own["rope"](H, W, x.permute(0, 3, 1, 2)) if rotary is None else rotary
        # Views of what the convolution wrote, in whichever order, read in place. As one split of
        # tokens they have one gradient.
        heads = self.num_heads, C // self.num_heads
        whole = over_tokens(own["qkvo"], x).reshape(B, H * W, 4, *heads)
        q, k, v, gate = self.parts(whole, rotary)
        out = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rotary)
        # A view likewise: the operators answer in the memory order of q.
        out = out.mT.reshape(B, C, H, W).permute(0, 2, 3, 1)
        y = over_tokens(own["lepe"], v.reshape(B, H, W, C), out, gate.reshape(B, H, W, C))
        return over_tokens(own["proj"], y)

    def parts(self, whole: Tensor, rotary: Any) -> Sequence[Tensor]:
        """q, k, v and g `(B, N, heads, d)` of `(B, N, 4, heads, d)`."""
        return whole.unbind(2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any) -> Tensor:
        """`(B, heads, N, d)` of q, k and v of that shape."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

"""EfficientViT's LiteMLA: ReLU linear attention on several scales at once.

    t_0 = W_qkv x          t_s = W_s dwc_s(t_0), a scale s with its own heads
    o_i = relu(q_i) sum_j relu(k_j)^T v_j / (relu(q_i) . sum_j relu(k_j) + 1e-15), (q, k, v) = t
    y   = norm(W_proj [o(t_0), o(t_s), ...])

x `(B, C_in, H, W)`, y `(B, C_out, H, W)`. dwc_s is a depthwise s x s convolution, W_s a 1 x 1
convolution of the channels of each q, k and v of a head alone.
Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", ICCV
2023, https://arxiv.org/abs/2205.14756; mit-han-lab/efficientvit. DC-AE (Chen et al., ICLR 2025,
https://arxiv.org/abs/2410.10733) has it too.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import linear_attn
from ..ops.autocast import cast_for_autocast
from ..ops.lite_mla_library import lite_mla
from .checks import check_kernel_size
from .lite_mla_weights import weights_of


class LiteMLA(nn.Module):
    """Multi-scale linear attention, `(B, C_in, H, W)` to `(B, C_out, H, W)`, of any H and W.

    Parameters bear the official names, which are those of timm's `LiteMLA` too: `qkv.conv`,
    `aggreg.0.0`, `aggreg.0.1`, `proj.conv` and `proj.norm`. The official code has a quadratic form
    for pictures of at most `dim` positions: it is the same function, and is not needed.

    On a GPU all but the norm is one operation, for kernels of 3 and 5 pixels and modules that were
    neither replaced nor given hooks.

    Args:
        in_channels: Channels C_in.
        out_channels: Channels C_out; None: C_in.
        heads: Heads of each scale. None: `heads_ratio * (in_channels // dim)`.
        heads_ratio: See `heads`.
        dim: Channels of a head; 16 or 32 in the official models.
        use_bias: Adds biases to all convolutions.
        norm_layer: Called with C_out, makes the norm after the projection. None: there is none.
        scales: Sides of the depthwise convolutions, odd; () for none, as in DC-AE's last stage.
        eps: Added to the denominator. timm has 1e-5, and its models need that.

    Raises:
        ValueError: If there would be no heads, or a scale is even.

    Example:
        >>> import torch
        >>> layer = LiteMLA(64, dim=16)
        >>> layer(torch.randn(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    takes_pictures = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: bool = False,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        scales: tuple[int, ...] = (5,),
        *,
        eps: float = 1e-15,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        heads = int(in_channels // dim * heads_ratio) if heads is None else heads
        out_channels = in_channels if out_channels is None else out_channels
        if heads < 1:
            raise ValueError(
                f"There must be a head at least, got heads={heads} of dim={dim} for "
                f"in_channels={in_channels}"
            )
        for scale in scales:
            check_kernel_size(scale)
        factory: dict[str, Any] = {"bias": use_bias, "device": device, "dtype": dtype}
        wide = 3 * heads * dim
        self.heads = heads
        self.dim = dim
        self.eps = eps
        self.qkv = nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels, wide, 1, **factory)))
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(wide, wide, scale, padding=scale // 2, groups=wide, **factory),
                nn.Conv2d(wide, wide, 1, groups=3 * heads, **factory),
            )
            for scale in scales
        )
        mixed = heads * dim * (1 + len(scales))
        self.proj = nn.Sequential(OrderedDict(conv=nn.Conv2d(mixed, out_channels, 1, **factory)))
        if norm_layer is not None:
            self.proj.add_module("norm", norm_layer(out_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the positions of `x` `(B, C_in, H, W)`, in NCHW or channels_last alike."""
        weights: Any = weights_of(self, x)
        if weights is not None:
            x, *weights = cast_for_autocast(x, *weights)
            y = lite_mla(x, weights, self.dim, self.eps)
            for norm in list(self.proj)[1:]:
                y = norm(y)
            return y
        qkv = self.qkv(x)
        # Each scale where its convolution wrote it; joined are the results, a third of that.
        scales = [self.attend(qkv), *(self.attend(aggregate(qkv)) for aggregate in self.aggreg)]
        return self.proj(torch.cat(scales, 1))

    def attend(self, qkv: Tensor) -> Tensor:
        """`(B, heads * dim, H, W)` of `(B, heads * 3 * dim, H, W)`."""
        size = qkv.shape[2:]
        # (B, heads, N, dim) views: next to one another lie the positions of a channel in NCHW.
        q, k, v = qkv.flatten(2).unflatten(1, (self.heads, 3, self.dim)).mT.unbind(2)
        out = linear_attn(q, k, v, feature_map="relu", normalizer="sum", eps=self.eps)
        # The op answers in the memory order of q, so that this is a view again.
        return out.mT.flatten(1, 2).unflatten(2, size)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim={self.dim}, eps={self.eps}"

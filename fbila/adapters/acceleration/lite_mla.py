"""The multi-scale linear attention of timm's EfficientViT (MIT), `LiteMLA`, by fbila's kernels.

    t_0 = W x           t_s = W_s dwconv_s(t_0), a scale more for each s
    y   = W_o [relu_attention(heads of t_0), relu_attention(heads of t_s), ...]

x and y are `(B, C, height, width)`. Of NCHW pictures the heads are `(B, H, D, N)`, tokens side by
side, and are read so; of channels_last ones `(B, N, H, D)`. For inference all t lie side by side
in one NCHW picture from the start.
"""

from typing import Any

from torch import Tensor, nn

from ...ops.autocast import without_autocast
from ..host import host
from ..kernel_checks import plain, pointwise
from .aggregation import aggregate
from .one_picture import in_one_picture, scales_of
from .relu_attention import attend_contiguous, attend_picture, join_heads, why_not_relu

with host("timm"):
    from timm.layers import register_notrace_module
    from timm.models.efficientvit_mit import ConvNormAct, LiteMLA


@register_notrace_module
class FastLiteMLA(LiteMLA):
    """timm's `LiteMLA` without its float32 copies."""

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the positions of `x` `(B, C, height, width)`."""
        weight = weight_alone(self.qkv)
        others = None if weight is None else scales_of(x, weight, self.aggreg, nn.Sequential)
        if others is not None:
            # The scales have no name here, and so are gone before the output is made.
            mixed = attend_contiguous(in_one_picture(x, weight, others), self.dim, self.eps)
            return self.proj(mixed)
        qkv = self.qkv(x)
        scales = [qkv, *(aggregate(qkv, scale, nn.Sequential) for scale in self.aggreg)]
        # In float32 autocast would round what timm does not.
        with without_autocast(qkv):
            outputs = [attend_picture(scale, self.dim, self.eps) for scale in scales]
        return self.proj(join_heads(outputs, (x.shape[2], x.shape[3])))

    @staticmethod
    def why_not(module: Any) -> str:
        """Why one of the class is none that this computes; `""` if it is one."""
        return why_not_relu(module.kernel_func)

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        """Heads of all scales and their channels."""
        channels = module.qkv.conv.out_channels
        return (1 + len(module.aggreg)) * channels // (3 * module.dim), module.dim


def weight_alone(module: Any) -> Any:
    """The weight `(O, C, 1, 1)` of a `ConvNormAct` that is a product by it, None for any other."""
    if not plain(module, ConvNormAct):
        return None
    conv = module.conv
    alone = (
        pointwise(conv)
        and conv.bias is None
        and plain(module.norm, nn.Identity)
        and plain(module.act, nn.Identity)
        and _drops_nothing(module.dropout)
    )
    return conv.weight if alone else None


def _drops_nothing(module: Any) -> bool:
    return plain(module, nn.Dropout) and not (module.training and module.p > 0)

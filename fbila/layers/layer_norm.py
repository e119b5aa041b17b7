"""LayerNorm, by the kernel that LinFusion's layers have where no gradient is wanted."""

import torch
from torch import Tensor, nn

from ..ops.autograd import direct, needs_gradient
from ..ops.norm_library import layer_norm

# A program keeps a whole row.
MOST = 4096


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, by fbila's kernel in inference on a GPU.

    Compiled, in training and under autocast it is PyTorch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the rows of `x` `(..., C)`."""
        if (
            len(self.normalized_shape) == 1
            and self.weight is not None
            and x.shape[-1:] == self.normalized_shape
            and x.shape[-1] <= MOST
            and x.dtype == self.weight.dtype
            and direct(x)
            and not torch.is_autocast_enabled(x.device.type)
            and not needs_gradient(x, self.weight, self.bias)
        ):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)

"""LayerNorm by one kernel forward and one backward, under autocast as well."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype, cast_for_autocast
from ..ops.autograd import direct
from ..ops.norm_library import layer_norm_directly
from .plain_modules import parameter

# A program keeps a whole row.
MOST = 4096
# What autocast casts, and all that the kernels read.
_CAST = {torch.float16, torch.bfloat16, torch.float32}
_DTYPES = _CAST | {torch.float64}


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, by fbila's kernels on a GPU.

    Under autocast it answers in float32, as PyTorch's does, but reads x as it is and keeps nothing
    else for the backward pass. The kernels cannot be differentiated twice: gradients of gradients
    need `nn.LayerNorm`. Compiled, within transforms of torch.func and for rows of more than 4096 it
    is PyTorch's own.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: Those of `nn.LayerNorm`.
        for_maps: For a result that linear maps and convolutions alone read. Under autocast it is in
            the dtype to which they would cast PyTorch's, and not in float32.

    Example:
        >>> import torch
        >>> LayerNorm(8, for_maps=True)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        for_maps: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.for_maps = for_maps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the rows of `x` `(..., C)`.

        Raises:
            NotImplementedError: In the backward pass, if a gradient of a gradient is wanted.
        """
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        dtype = self._dtype_of_kernel(x, weight, bias)
        if dtype is not None:
            return layer_norm_directly(x, weight, bias, self.eps, dtype)
        y = super().forward(x)
        return cast_for_autocast(y)[0] if self.for_maps else y

    def _dtype_of_kernel(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> torch.dtype | None:
        """What the kernel answers in; None where it does not stand for PyTorch's own."""
        if not direct(x, weight, bias) or x.shape[-1:] != self.normalized_shape:
            return None
        if self.normalized_shape[0] > MOST:
            return None
        kinds = {x.dtype}
        for t in (weight, bias):
            if t is not None:
                kinds.add(t.dtype)
        cast = autocast_dtype(x)
        if cast is not None:
            if not kinds <= _CAST:
                return None
            return cast if self.for_maps else torch.float32
        if len(kinds) > 1 or x.dtype not in _DTYPES:
            return None
        return x.dtype

    def extra_repr(self) -> str:
        return super().extra_repr() + f", for_maps={self.for_maps}"

"""A depthwise convolution whose output is added to something, over a picture in channels_last."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.depthwise_conv_library import depthwise_conv


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a group for each channel and zeros around it, sums and activations.

    Of a picture in channels_last, which tokens are, all of it is one kernel on a GPU.

    Args:
        dim: Channels C.
        kernel_size: Side of the kernels; odd.
        bias: Whether there is one.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 5, 7)
        >>> DepthwiseConv2d(8, 3)(x, residual=True).shape
        torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            dim,
            dim,
            kernel_size,
            padding=kernel_size // 2,
            groups=dim,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        addend: Tensor | None = None,
        gate: Tensor | None = None,
        residual: bool = False,
        gelu: bool = False,
        silu: bool = False,
    ) -> Tensor:
        """`act(conv(f(x)) + addend + f(x)) * gate`, of which the last three may be missing.

        Args:
            x: `(B, C, H, W)`.
            addend, gate: Of the same shape; None for nothing.
            residual: Whether to add `f(x)`.
            gelu: Whether f is GELU; the identity otherwise.
            silu: Whether act is SiLU; the identity otherwise.

        Returns:
            `(B, C, H, W)`, in channels_last if x is.
        """
        if x.dim() == 4 and x.stride(1) == 1:
            addend, gate = (None if t is None else t.permute(0, 2, 3, 1) for t in (addend, gate))
            options: dict[str, Any] = {"residual": residual, "gelu": gelu, "silu": silu}
            tensors = (x.permute(0, 2, 3, 1), self.weight, self.bias, addend, gate)
            y = depthwise_conv(*tensors, **options)
            return y.permute(0, 3, 1, 2)
        x = F.gelu(x) if gelu else x
        y = super().forward(x)
        y = x + y if residual else y
        y = y if addend is None else addend + y
        y = F.silu(y) if silu else y
        return y if gate is None else y * gate

"""A linear layer, maybe of GELU, that keeps and sums less in training than PyTorch's."""

from torch import Tensor, nn

from ..ops.linear import linear
from .plain_modules import parameter


class Linear(nn.Linear):
    """`nn.Linear`, whose training on a GPU sums the bias's gradient by a kernel.

    Compiled and in inference it is PyTorch's own, and for fewer than 2^25 elements on either side,
    but for a bias of 2^17 rows or more and 2^23 elements.

    Args:
        in_features, out_features, bias, device, dtype: Those of `nn.Linear`.

    Example:
        >>> import torch
        >>> Linear(8, 4)(torch.randn(2, 5, 8), gelu=True).shape
        torch.Size([2, 5, 4])
    """

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """`(..., I)` -> `(..., O)`.

        Args:
            input: `(..., I)`.
            gelu: Whether the map is of its GELU, which kernels do not keep for the backward pass.
        """
        return linear(input, parameter(self, "weight"), parameter(self, "bias"), gelu)

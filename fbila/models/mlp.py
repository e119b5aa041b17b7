"""The feed-forward layer of transformer blocks, `fc2(gelu(fc1(x)))`."""

from typing import Any

from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.plain_modules import plain


class Mlp(TimmMlp):
    """timm's, with GELU, which keeps a large hidden layer once for the backward pass, not twice.

    `fbila.layers.linear` says when; a module that was replaced or has a hook is called as it is.

    Args:
        dim: Channels.
        hidden: Channels of the hidden layer.
        drop: Dropout probability after either map.

    Example:
        >>> import torch
        >>> Mlp(8, 32)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, hidden, drop=drop, **factory)
        self.fc1 = Linear(dim, hidden, **factory)
        self.fc2 = Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same shape."""
        x = self.fc1(x)
        if self._is_of_gelu():
            x = self.fc2(x, gelu=True)
        else:
            x = self.fc2(self.norm(self.drop1(self.act(x))))
        return self.drop2(x)

    def _is_of_gelu(self) -> bool:
        """Whether fc2 is of the GELU alone, and no module was replaced or given a hook."""
        drop = plain(self.drop1, nn.Dropout) and not (self.training and self.drop1.p > 0)
        return (
            drop
            and plain(self.act, nn.GELU)
            and self.act.approximate == "none"
            and plain(self.norm, nn.Identity)
            and plain(self.fc2, Linear)
        )

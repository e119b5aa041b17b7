"""The feed-forward layer of transformer blocks, `fc2(gelu(fc1(x)))`."""

from typing import Any

from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.plain_modules import idle, plain


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
        parts: Any = self._modules
        x = parts["fc1"](x)
        if self._is_of_gelu():
            x = parts["fc2"](x, gelu=True)
        else:
            x = self.fc2(self.norm(self.drop1(self.act(x))))
        return x if idle(parts["drop2"]) else self.drop2(x)

    def _is_of_gelu(self) -> bool:
        """Whether fc2 is of the GELU alone, and no module was replaced or given a hook."""
        parts: Any = self._modules
        drop, act = parts["drop1"], parts["act"]
        return (
            plain(drop, nn.Dropout)
            and not (self.training and drop.p > 0)
            and plain(act, nn.GELU)
            and act.approximate == "none"
            and plain(parts["norm"], nn.Identity)
            and plain(parts["fc2"], Linear)
        )

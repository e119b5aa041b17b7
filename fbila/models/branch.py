"""The sum of a branch of a transformer block and what it branched off from."""

from timm.layers import DropPath
from torch import Tensor, nn

from ..layers.plain_modules import idle


def add_branch(x: Tensor, y: Tensor, drop_path: nn.Module) -> Tensor:
    """`x + drop_path(y)`; what does nothing is not called."""
    return x + (y if idle(drop_path, DropPath) else drop_path(y))

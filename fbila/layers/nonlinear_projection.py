"""F(x) = W_2 LeakyReLU(LayerNorm(W_1 x + b_1)) + b_2, LinFusion's non-linear projection."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autograd import ordinary
from ..ops.norm_library import layer_norm_leaky_relu

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NonlinearProjection(nn.Sequential):
    """`(..., dim)` to `(..., dim)`, with parameters under the names `0`, `1` and `3`.

    On a GPU the norm and the activation are one kernel, which keeps its input in the dtype that it
    has; under autocast PyTorch's keep two copies in float32.

    Args:
        dim: Channels.
        mid_dim: Width between the two linear maps.
    """

    def __init__(self, dim: int, mid_dim: int, *, device: Any = None, dtype: Any = None) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Linear(dim, mid_dim, **factory),
            nn.LayerNorm(mid_dim, **factory),
            nn.LeakyReLU(inplace=True),
            nn.Linear(mid_dim, dim, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """F(x)."""
        modules: Any = self._modules
        norm, activation = modules["1"], modules["2"]
        h = modules["0"](x)
        if torch.compiler.is_compiling() or not _in_kernel(h, norm, activation):
            return modules["3"](activation(norm(h)))
        rows = h.reshape(1, -1, h.shape[-1])
        rows = layer_norm_leaky_relu(
            rows, norm.weight[None], norm.bias[None], norm.eps, activation.negative_slope
        )
        return modules["3"](rows.view(h.shape))


def _in_kernel(h: Tensor, norm: nn.Module, activation: nn.Module) -> bool:
    return h.is_cuda and ordinary(h) and untouched(norm) and untouched(activation)


def untouched(module: nn.Module) -> bool:
    """Whether to call a module is to run the forward of the class it was made of, and no more."""
    state = vars(module)
    return (
        type(module) in _CLASSES
        and "forward" not in state
        and not any(state[hooks] for hooks in _HOOKS)
    )


_CLASSES = (nn.Linear, nn.LayerNorm, nn.LeakyReLU, nn.Dropout, NonlinearProjection)

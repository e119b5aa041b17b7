"""LayerNorm followed by LeakyReLU as a torch.library op, for inference.

`fbila::layer_norm_leaky_relu`: x `(P, R, D)`, weight and bias `(P, D)` -> `(P, R, D)`. Each of P
sets of rows is normalised over D and has its own weight and bias. A kernel on CUDA, PyTorch
elsewhere.
"""

import torch
import torch.nn.functional as F

from .library import LIBRARY, sum_dtype

LIBRARY.define(
    "layer_norm_leaky_relu(Tensor x, Tensor weight, Tensor bias, float eps, float slope) -> Tensor"
)


def in_kernel(x, weight, bias, eps, slope):
    from .kernels.norm import launch_norm

    if x.numel() == 0:
        return x.new_empty(x.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return launch_norm(x, weight.contiguous(), bias.contiguous(), eps, slope)


def in_pytorch(x, weight, bias, eps, slope):
    wide = sum_dtype(x)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return F.leaky_relu(normed * weight[:, None].to(wide) + bias[:, None].to(wide), slope).to(
        x.dtype
    )


LIBRARY.impl("layer_norm_leaky_relu", in_kernel, "CUDA")
LIBRARY.impl("layer_norm_leaky_relu", in_pytorch, "CPU")


@torch.library.register_fake("fbila::layer_norm_leaky_relu", lib=LIBRARY)
def _(x, weight, bias, eps, slope):
    return x.new_empty(x.shape)


def layer_norm_leaky_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, slope: float
) -> torch.Tensor:
    return torch.ops.fbila.layer_norm_leaky_relu(x, weight, bias, eps, slope)

"""GEGLU as a torch.library op, for inference.

`fbila::geglu`: x `(..., 2 D)` -> `(..., D)`, the first half times the GELU of the second, as
diffusers' feed-forward layers have it. A kernel on CUDA, PyTorch elsewhere.
"""

import torch
import torch.nn.functional as F

from .autograd import ordinary
from .library import LIBRARY, sum_dtype

LIBRARY.define("geglu(Tensor x) -> Tensor")


def empty_half(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"The last axis of x must be two halves, got {list(x.shape)}.")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def in_kernel(x):
    from .kernels.geglu import launch_geglu

    y = empty_half(x)
    if y.numel():
        launch_geglu(x.contiguous(), y)
    return y


def in_pytorch(x):
    y = empty_half(x)
    a, g = x.to(sum_dtype(x)).chunk(2, -1)
    return y.copy_(a * F.gelu(g))


LIBRARY.impl("geglu", in_kernel, "CUDA")
LIBRARY.impl("geglu", in_pytorch, "CPU")
torch.library.register_fake("fbila::geglu", empty_half, lib=LIBRARY)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`fbila::geglu`, straight away where nothing stands in between."""
    return in_kernel(x) if x.is_cuda and ordinary(x) else torch.ops.fbila.geglu(x)

"""RMSNorm as a torch.library op, for inference.

    y = x / sqrt(mean(x^2) + eps) * weight + bias

`fbila::rms_norm`: x `(..., D)`, weight and bias `(D,)` or None -> `(..., D)` in x's dtype or
another, by the kernel of LayerNorm on CUDA, PyTorch elsewhere. PyTorch's own `rms_norm` has no
bias, which DC-AE's norms have, and is one kernel only for a weight of x's dtype.
"""

import torch

from .autograd import direct
from .inference import inference_only, require_no_gradient
from .library import LIBRARY, sum_dtype
from .memory_format import beside, dtypes_of

LIBRARY.define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? dtype=None) -> Tensor"
)


def in_kernel(x, weight, bias, eps, dtype=None):
    from .kernels.norm import plan_layer_norm

    weight, bias = beside(x, x.shape[-1:], weight, bias)
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if y.numel():
        others = dtypes_of(weight, bias, y)
        plan_layer_norm(x.shape, x.dtype, others, eps, centred=False)(x, weight, bias, y)
    return y


def in_pytorch(x, weight, bias, eps, dtype=None):
    wide = x.to(sum_dtype(x))
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight, bias = beside(x, x.shape[-1:], weight, bias)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(dtype or x.dtype).contiguous()


LIBRARY.impl("rms_norm", in_kernel, "CUDA")
LIBRARY.impl("rms_norm", in_pytorch, "CPU")
inference_only("rms_norm")


@torch.library.register_fake("fbila::rms_norm", lib=LIBRARY)
def _(x, weight, bias, eps, dtype=None):
    return x.new_empty(x.shape, dtype=dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`fbila::rms_norm`, straight away where nothing stands in between."""
    if not direct(x):
        return torch.ops.fbila.rms_norm(x, weight, bias, eps, dtype)
    require_no_gradient("rms_norm", x, weight, bias)
    return in_kernel(x, weight, bias, eps, dtype)

"""Feature maps inside the kernels: phi(x) and its derivative, elementwise on a loaded tile.

The specification of each map is the function of the same name in `fbila.ops.feature_maps`.
"""

import triton
import triton.language as tl


@triton.jit
def feature(x, FEATURE_MAP: tl.constexpr):
    """phi(x) for a tile `x` that is already in the accumulation type."""
    if FEATURE_MAP == "elu1":
        return tl.where(x > 0, x + 1.0, exp(x))
    elif FEATURE_MAP == "relu":
        # Written with x < 0 so that NaN passes through, as it does in torch.relu.
        return tl.where(x < 0, 0.0, x)
    elif FEATURE_MAP == "relu_offset":
        return tl.where(x < 0, 0.0, x) + tl.full((), 1e-6, x.dtype)
    elif FEATURE_MAP == "exp":
        return exp(x)
    else:
        return x


@triton.jit
def exp(x):
    """e^x. In float32 by exp2, which compiles to one multiplication and one instruction; exp
    spends four more on results below 1e-38."""
    if x.dtype == tl.float32:
        return tl.exp2(x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def feature_gradient(dphi, phi, FEATURE_MAP: tl.constexpr):
    """dphi * phi'(x), from `phi` = phi(x): all maps tell their slope by their value.

    A select, not a product, where phi' is 0: 0 * inf would be NaN. A NaN in x leaves relu's
    dphi as it is, as in PyTorch.
    """
    if FEATURE_MAP == "elu1":
        return dphi * tl.minimum(phi, 1.0, propagate_nan=tl.PropagateNan.ALL)
    elif FEATURE_MAP == "relu":
        return tl.where(phi <= 0, 0.0, dphi)
    elif FEATURE_MAP == "relu_offset":
        return tl.where(phi <= tl.full((), 1e-6, phi.dtype), 0.0, dphi)
    elif FEATURE_MAP == "exp":
        return dphi * phi
    else:
        return dphi

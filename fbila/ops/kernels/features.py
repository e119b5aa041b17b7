"""Feature maps inside the kernels: phi(x) and its derivative, elementwise on a loaded tile.

The specification of each map is the function of the same name in `fbila.ops.feature_maps`.
"""

import triton
import triton.language as tl

from .focus import focused
from .masks import column_mask, tile_mask
from .tiles import load_pair, store_pair


@triton.jit
def features(
    x0, x1, rows, c_0, c_1, o_n, m_n, N, K1: tl.constexpr, FEATURE_MAP: tl.constexpr,
    POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """phi of both tiles of a block of tokens, in the accumulation type.

    With `rows` `(3, N)` it is the focused map, of which they are what all heads of a token share.
    """
    x0, x1 = x0.to(ACC), x1.to(ACC)
    if FEATURE_MAP == "signed":
        x0, x1 = feature(x0, "relu"), feature(-x1, "relu")
    elif rows is None:
        x0 = feature(x0, FEATURE_MAP)
        if K1 > 0:
            x1 = feature(x1, FEATURE_MAP)
    else:
        t = tl.load(rows + o_n, mask=m_n, other=0.0)
        w = tl.load(rows + N + o_n, mask=m_n, other=0.0)
        x0 = focused(x0, c_0, t, w, POWER)
        if K1 > 0:
            x1 = focused(x1, c_1, t, w, POWER)
    return x0, x1


@triton.jit
def load_columns(
    rows, columns, i_h, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KB: tl.constexpr
):
    """The focused map's factor of each channel `(H, K)`, for one head's tiles."""
    if rows is None:
        return 1.0, 1.0
    else:
        columns += i_h * K
        c_0 = tl.load(columns + tl.arange(0, K0), mask=column_mask(0, K, K0, KB), other=0.0)
        c_1 = c_0
        if K1 > 0:
            o_k = KB + tl.arange(0, K1)
            c_1 = tl.load(columns + o_k, mask=o_k < K, other=0.0)
        return c_0, c_1


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
def load_channels(
    pointer, offset0, offset1, rows, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    KB: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """What both tiles of K features are made of: with "signed" the same channels."""
    if FEATURE_MAP == "signed":
        x = tl.load(pointer + offset0, mask=tile_mask(rows, 0, K, K0, KB), other=0.0)
        return x, x
    else:
        return load_pair(pointer, offset0, offset1, rows, 0, K, K0, K1, KB)


@triton.jit
def store_channels(
    pointer, x0, x1, offset0, offset1, rows, K: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, KB: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """Where `load_channels` loads from."""
    if FEATURE_MAP == "signed":
        x0 = x0.to(pointer.dtype.element_ty)
        tl.store(pointer + offset0, x0, mask=tile_mask(rows, 0, K, K0, KB))
    else:
        store_pair(pointer, x0, x1, offset0, offset1, rows, 0, K, K0, K1, KB)


@triton.jit
def feature_gradients(dphi0, dphi1, phi0, phi1, K1: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """The gradient of both tiles' channels; with "signed" that of the same ones, twice."""
    if FEATURE_MAP == "signed":
        dx = feature_gradient(dphi0, phi0, "relu") - feature_gradient(dphi1, phi1, "relu")
        return dx, dx
    else:
        dx0 = feature_gradient(dphi0, phi0, FEATURE_MAP)
        dx1 = dx0
        if K1 > 0:
            dx1 = feature_gradient(dphi1, phi1, FEATURE_MAP)
        return dx0, dx1


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
    elif FEATURE_MAP == "focused":
        # What `grad_focus_kernel` starts from.
        return dphi * phi
    else:
        return dphi

"""What is added to keys as they are loaded: a shift of each token, the same for all items.

shift `(N, H, K)`, contiguous, in the dtype of the keys. The sum is rounded to that dtype, as it is
where it is computed before.
"""

import triton
import triton.language as tl

from .masks import tile_mask


@triton.jit
def shifted_pair(
    x0, x1, shift, i_h, o_n, rows, H, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    KB: tl.constexpr,
):  # fmt: skip
    """Both tiles of one head, whose tokens are `o_n`."""
    if shift is not None:
        first = i_h * K
        o_k = first + tl.arange(0, K0)
        x0 = shifted(x0, shift, o_n, o_k, H * K, tile_mask(rows, 0, K, K0, KB))
        if K1 > 0:
            o_k = first + KB + tl.arange(0, K1)
            x1 = shifted(x1, shift, o_n, o_k, H * K, tile_mask(rows, KB, K, K1, K1))
    return x0, x1


@triton.jit
def shifted(x, shift, o_n, o_c, channels, mask):
    """A tile of the tokens `o_n` and of `o_c` of their channels, counted over all heads."""
    if shift is None:
        return x
    else:
        p_s = shift + o_n.to(tl.int64)[:, None] * channels + o_c[None, :]
        return x + tl.load(p_s, mask=mask, other=0.0)

"""Products added in place to columns of a wider tensor, as a torch.library op.

`fbila::add_products_`: y `(..., W)` dense, h `(P, R, K)`, weight `(P, K, C)`, for the R rows of y:

    y[r, first + p C : first + (p + 1) C] += h[p, r] weight[p]

It has no gradient. A compiler that takes `baddbmm` apart copies what it adds to; an op that says
what it writes over is left as it is.
"""

import torch
from torch import Tensor

from .library import LIBRARY

LIBRARY.define("add_products_(Tensor(a!) y, Tensor h, Tensor weight, int first) -> ()")


def in_place(y: Tensor, h: Tensor, weight: Tensor, first: int) -> None:
    P, R, _ = h.shape
    C, W = weight.shape[-1], y.shape[-1]
    columns = y.as_strided((P, R, C), (C, W, 1), y.storage_offset() + first)
    columns.baddbmm_(h, weight)


LIBRARY.impl("add_products_", in_place, "CUDA")
LIBRARY.impl("add_products_", in_place, "CPU")


@torch.library.register_fake("fbila::add_products_", lib=LIBRARY)
def _(y, h, weight, first):
    return None


def add_products_(y: Tensor, h: Tensor, weight: Tensor, first: int) -> None:
    """`fbila::add_products_`, straight away where no graph is traced."""
    run = torch.ops.fbila.add_products_ if torch.compiler.is_compiling() else in_place
    run(y, h, weight, first)

"""Narrow heads in 16 bits err no more than float32 sums of the same features, rounded at the end.

That is how Sana, DC-AE and EfficientViT compute their attention: from float32 copies.
"""

import pytest
import torch
from helpers import LOW, Variant, make_qkv

# Batch, heads, tokens and head dim of Sana, DC-AE at several levels, and EfficientViT, the last two
# tokens side by side; fewer heads where they do not matter. The last three are short sequences.
SHAPES = {
    "Sana": (1, 4, 1024, 32),
    "DC-AE, first level": (1, 2, 4096, 32),
    "DC-AE, last level": (1, 4, 1000, 32),
    "EfficientViT-L": (1, 2, 784, 32),
    "EfficientViT-B": (2, 2, 784, 16),
    "EfficientViT-L, 224 px": (2, 4, 196, 32),
    "EfficientViT-B, 224 px": (2, 4, 196, 16),
    "EfficientViT-L, last level": (2, 4, 49, 32),
}


def rms_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eps", [1e-15, 1e-5])
def test_error_is_that_of_rounding_the_result(shape, dtype, eps):
    B, H, N, D = shape
    q, k, v, _ = make_qkv((B, H, N, N, D, D), dtype)
    if N != 1024:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    variant = Variant("sum", "relu", eps)
    truth = variant(q.double(), k.double(), v.double(), impl="reference")
    # The reference sums in float32.
    stock = variant(q, k, v, impl="reference")
    # What is left of either is one rounding, of nearly the same numbers.
    assert rms_error(variant(q, k, v), truth) <= 1.005 * rms_error(stock, truth)

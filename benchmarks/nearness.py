"""How near two results are, by norm, |x - y| / |y|; and what is not near enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Wrong(Exception):
    """What was computed is not what it should be; the words say by how much."""


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def require(name: str, error: float, bound: float) -> None:
    # A NaN is within no bound.
    if not error <= bound:
        raise Wrong(f"{name} {error:.2e}, more than {bound:.2e}")


@contextmanager
def precise() -> Iterator[None]:
    """float32 without TF32, which convolutions have by default and which rounds like float16."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before

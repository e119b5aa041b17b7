"""Offsets beyond 2^31 elements, and more heads than a grid's second axis can hold.

On a CPU the storage of 4 GiB is never touched but for the few tokens in use.
"""

import pytest
import torch
from helpers import DEVICE, MEAN, assert_same_bits, make_qkv, run

FAR = 2**31 + 64


def scatter(x, strides):
    """The values of `x` as a view with `strides`, in a storage that large."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    view = torch.empty(last + 1, dtype=x.dtype, device=DEVICE).as_strided(x.shape, strides)
    return view.copy_(x)


@pytest.mark.parametrize(
    "axis, strides",
    [
        ("batch", (FAR, 1000, 16, 1)),
        ("head", (1000, FAR, 16, 1)),
        ("token", (1000, 500, FAR, 1)),
        ("head_dim", (10, 5, 1, FAR)),
        # Each stride fits in 32 bits; its product with the index does not.
        ("batch of 3", (2**30, 1000, 16, 1)),
        ("3 heads", (1000, 2**30, 16, 1)),
        ("9 tokens", (1000, 500, 2**28, 1)),
        ("9 wide", (1000, 500, 16, 2**28)),
    ],
)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_far_apart(name, axis, strides):
    B, H, N, D = {
        "batch": (2, 1, 3, 4),
        "head": (1, 2, 3, 4),
        "token": (1, 1, 2, 4),
        "head_dim": (1, 1, 3, 2),
        "batch of 3": (3, 1, 3, 4),
        "3 heads": (1, 3, 3, 4),
        "9 tokens": (1, 1, 9, 4),
        "9 wide": (1, 1, 3, 9),
    }[axis]
    tensors = make_qkv((B, H, N, N, D, D), torch.float16)
    expected = run(MEAN, *tensors)
    i = ["q", "k", "v", "do"].index(name)
    tensors[i] = scatter(tensors[i], strides)
    assert_same_bits(run(MEAN, *tensors), expected, reordered=strides[-1] != 1)


@pytest.mark.gpu
def test_results_of_more_than_2_31_elements():
    B, H, N, D = 2, 130, 131_072, 64
    assert B * H * N * D > 2**31
    q = torch.randn(B, H, N, D, dtype=torch.float16, device="cuda", requires_grad=True)
    do = torch.randn_like(q)
    o = MEAN(q, q, q)
    (dq,) = torch.autograd.grad(o, q, do)
    last = q[-1:, -1:].detach().requires_grad_()
    expected = MEAN(last, last, last)
    (expected_dq,) = torch.autograd.grad(expected, last, do[-1:, -1:])
    assert torch.equal(o[-1:, -1:], expected)
    assert torch.equal(dq[-1:, -1:], expected_dq)


@pytest.mark.gpu
@pytest.mark.parametrize("B, H", [(65_552, 1), (1, 65_552), (8194, 16)])
def test_many_heads(B, H):
    tensors = make_qkv((B, H, 16, 16, 16, 16), torch.float16)
    for x, y in zip(run(MEAN, *tensors), run(MEAN, *(x[-1:, -1:] for x in tensors)), strict=True):
        assert torch.equal(x[-1:, -1:], y)

"""The gradients of the kernels are the derivatives of the kernels, in float64."""

import pytest
import torch
from helpers import ALL_VARIANTS, VARIANTS, make_qkv


def check(shape, variant, **options):
    q, k, v, _ = make_qkv(shape, torch.float64, variant=variant, away_from_zero=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(variant._replace(eps=1e-6), leaves, **options)


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=lambda x: x.name)
def test_every_entry_of_the_jacobian(variant):
    check((1, 1, 3, 4, 3, 2), variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 2, 1, 3, 8, 8), id="one query"),
        pytest.param((2, 1, 33, 17, 5, 16), id="two tiles of queries"),
        pytest.param((1, 1, 3, 4, 40, 36), id="heads wider than a tile"),
        pytest.param((1, 1, 520, 530, 3, 4), id="two splits"),
    ],
)
def test_a_projection_of_the_jacobian(shape, variant):
    check(shape, variant, fast_mode=True)

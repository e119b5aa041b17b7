"""Empty inputs give empty or zero results, zero gradients, and launch nothing."""

import pytest
import torch
from helpers import DTYPES, VARIANTS, make_qkv, run

SHAPE = {"B": 2, "H": 3, "N": 5, "M": 7, "K": 4, "V": 6}


@pytest.mark.parametrize("empty", ["B", "H", "N", "M", "V", "BHNMV"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_empty(impl, variant, dtype, empty, launches):
    shape = [0 if name in empty else size for name, size in SHAPE.items()]
    q, k, v, do = make_qkv(shape, dtype)
    o, dq, dk, dv = run(lambda *x: variant(*x, impl=impl), q, k, v, do)
    for result, like in ((o, do), (dq, q), (dk, k), (dv, v)):
        assert result.shape == like.shape and result.dtype == dtype
        assert not result.any()
    assert launches == []


def test_without_keys_eps_0_gives_zero():
    q, k, v, _ = make_qkv((1, 1, 4, 0, 4, 4), torch.float32)
    for impl in ("triton", "reference"):
        for variant in VARIANTS[:2]:
            assert not variant._replace(eps=0.0)(q, k, v, impl=impl).any()


def test_empty_results_keep_the_order_of_the_query():
    q, k, v, _ = make_qkv((2, 3, 5, 0, 4, 6), torch.float32)
    o = VARIANTS[0](q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert o.transpose(1, 2).is_contiguous()

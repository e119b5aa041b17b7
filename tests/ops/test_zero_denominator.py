"""A denominator of zero plus eps gives finite results: zero, where the numerator is zero too."""

import pytest
import torch
from helpers import DEVICE, DTYPES, Variant, make_qkv, run

VARIANTS = [
    Variant(normalizer, "relu", eps) for normalizer in ("mean", "sum") for eps in (1e-6, 1e-15)
]

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
each_impl = pytest.mark.parametrize("impl", ["triton", "reference"])


def finite(tensors):
    return all(x.isfinite().all() for x in tensors)


@each_impl
@each_dtype
@each_variant
def test_a_query_without_features(variant, dtype, impl):
    q, k, v, do = make_qkv((1, 2, 20, 33, 16, 8), dtype)
    q[:, :, 3] = -1  # relu gives 0
    q[:, :, 4] = 0
    o, dq, dk, dv = run(lambda *x: variant(*x, impl=impl), q, k, v, do)
    assert finite([o, dq, dk, dv])
    assert not o[:, :, 3:5].any() and not dq[:, :, 3:5].any()
    # These rows say nothing about the keys either.
    others = [x[:, :, [0, 1, 2, *range(5, 20)]] for x in (q, do)]
    rest = run(lambda *x: variant(*x, impl=impl), others[0], k, v, others[1])
    for a, b in zip((dk, dv), rest[2:], strict=True):
        bound = 4 * torch.finfo(dtype).eps * float(b.abs().max())
        assert float((a - b).abs().max()) <= bound


@each_impl
@each_dtype
@each_variant
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_keys_without_features(variant, dtype, impl, value):
    q, k, v, do = make_qkv((1, 2, 20, 33, 16, 8), dtype)
    o, dq, dk, dv = run(lambda *x: variant(*x, impl=impl), q, k.fill_(value), v, do)
    assert finite([o, dq, dk, dv])
    assert not any(x.any() for x in (o, dq, dk, dv))


@each_impl
@each_dtype
@each_variant
def test_zeros_without_a_feature_map(variant, dtype, impl):
    q, k, v, _ = make_qkv((1, 2, 20, 33, 16, 8), dtype)
    variant = variant._replace(feature_map=None)
    assert not variant(torch.zeros_like(q), k, v, impl=impl).any()
    assert not variant(q, torch.zeros_like(k), v, impl=impl).any()


@each_dtype
def test_eps_is_what_bounds_a_small_denominator(dtype):
    # phi(q) . mean = 2^-20 per key and eps = 2^-20: half of the value comes back.
    q = torch.full((1, 1, 3, 16), 2.0**-10)
    k = torch.full((1, 1, 8, 16), 2.0**-14)
    v = torch.ones(1, 1, 8, 4)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    for normalizer, eps in (("mean", 2.0**-20), ("sum", 2.0**-17)):
        o = Variant(normalizer, "relu", eps)(q, k, v)
        assert torch.equal(o, torch.full_like(o, 0.5))

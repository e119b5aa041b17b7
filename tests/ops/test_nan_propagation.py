"""NaN and Inf go where they go in the reference: nowhere else, and they do not disappear."""

import pytest
import torch
from helpers import DTYPES, Variant, make_qkv, run

NAN, INF = float("nan"), float("inf")
MAPS = [Variant(n, f) for n in ("mean", None) for f in (None, "elu1", "relu")]
MAPS.append(Variant("mean", "signed"))

each_variant = pytest.mark.parametrize("variant", MAPS, ids=lambda x: x.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kinds(x):
    """0 for finite, 1 for NaN, 2 and 3 for the infinities."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def assert_same_kinds(variant, q, k, v, do=None):
    actual = run(variant, q, k, v, do)
    expected = run(lambda *x: variant(*x, impl="reference"), q, k, v, do)
    for name, x, y in zip(["o", "dq", "dk", "dv"], actual, expected, strict=False):
        assert torch.equal(kinds(x), kinds(y)), name
    return actual


@each_variant
@each_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_forward(where, value, variant, dtype):
    tensors = dict(
        zip("qkv", make_qkv((2, 1, 20, 33, 17, 8), dtype, variant=variant), strict=False)
    )
    tensors[where][1, 0, 5, 3] = value
    (o,) = assert_same_kinds(variant, **tensors)
    # Only one item at most is touched, and of it one row or one column.
    assert o[0].isfinite().all()
    if where == "q":
        assert o[1, 0, [*range(5), *range(6, 20)]].isfinite().all()
    if where == "v":
        assert o[1, 0, :, [*range(3), *range(4, 8)]].isfinite().all()
        assert not o[1, 0, :, 3].isfinite().any()


@each_variant
@each_dtype
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
def test_gradients_of_nan(where, variant, dtype):
    names = ["q", "k", "v", "do"]
    tensors = make_qkv((2, 1, 20, 33, 17, 8), dtype, variant=variant)
    tensors[names.index(where)][1, 0, 5, 3] = NAN
    for x in assert_same_kinds(variant, *tensors):
        assert x[0].isfinite().all()


@each_dtype
@pytest.mark.parametrize("value", [INF, -INF], ids=str)
def test_gradients_of_an_infinite_value(value, dtype):
    variant = Variant(None)
    q, k, v, do = make_qkv((2, 1, 20, 33, 17, 8), dtype)
    v[1, 0, 5, 3] = value
    assert_same_kinds(variant, q, k, v, do)


@each_dtype
def test_an_infinite_gradient_stays_in_its_column(dtype):
    q, k, v, do = make_qkv((2, 1, 20, 33, 17, 8), dtype)
    do[1, 0, 5, 3] = INF  # as a loss scale that overflows makes it
    assert_same_kinds(Variant(None), q, k, v, do)

"""Under autocast the inputs are cast as scaled_dot_product_attention casts them."""

import pytest
import torch
from helpers import DEVICE, LOW, MEAN, SIMPLE, make_qkv, run

each_low = pytest.mark.parametrize("low", LOW, ids=str)
each_variant = pytest.mark.parametrize("variant", [MEAN, SIMPLE], ids=lambda x: x.name)


@each_variant
@each_low
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_autocast_dtype_is_used_and_returned(variant, low, impl):
    q, k, v, do = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    expected = run(lambda *x: variant(*x, impl=impl), *(x.to(low) for x in (q, k, v, do)))

    def autocast(*tensors):
        with torch.autocast(DEVICE, dtype=low):
            return variant(*tensors, impl=impl)

    actual = run(autocast, q, k, v, do.to(low))
    assert actual[0].dtype == low
    assert torch.equal(actual[0], expected[0])
    for gradient, low_gradient in zip(actual[1:], expected[1:], strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, low_gradient.float())


@each_low
def test_mixed_dtypes_meet_under_autocast_only(low):
    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    with torch.autocast(DEVICE, dtype=low):
        mixed = MEAN(q, k.to(low), v)
    assert torch.equal(mixed, MEAN(*(x.to(low) for x in (q, k, v))))
    message = f"q.dtype=torch.float32, k.dtype={low} and v.dtype=torch.float32"
    with pytest.raises(TypeError, match=message):
        MEAN(q, k.to(low), v)


def test_disabled_autocast_changes_nothing():
    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    with torch.autocast(DEVICE, enabled=False):
        assert torch.equal(MEAN(q, k, v), MEAN(q, k, v))
        assert MEAN(q, k, v).dtype == torch.float32


def test_float64_is_left_alone():
    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float64)
    expected = MEAN(q, k, v)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert torch.equal(MEAN(q, k, v), expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_dtype_and_device_of_the_query_come_back(dtype):
    q, k, v, do = make_qkv((1, 2, 33, 20, 16, 8), dtype)
    for x in run(MEAN, q, k, v, do):
        assert x.dtype == dtype and x.device == q.device


def test_meta_tensors_have_shapes_and_strides():
    q, k, v, _ = (x.to("meta") for x in make_qkv((1, 2, 33, 20, 16, 8), torch.float16))
    for impl in ("triton", "reference", None):
        o = MEAN(q, k, v, impl=impl)
        assert o.device.type == "meta"
        assert o.shape == (1, 2, 33, 8) and o.dtype == torch.float16
